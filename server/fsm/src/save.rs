//! One save of a set of devices, from the admission to the last released lease.
//!
//! ```text
//!   Admitted
//!      | Start
//!   PreCopying, or AwaitingCutover         devices run
//!      | cutover
//!   Quiescing                              devices run, but start no peer DMA
//!      |
//!   Stopping                               the downtime begins
//!      |
//!   Draining
//!      |
//!   Parking                                devices in STOP: configuration space can be read
//!      |
//!   Sealing ----------- left stopped ------------------------.
//!      |      \------- held -------> Held ---- the hold expires ---> Marking
//!      | resume at once              | Resume                |       |
//!   - -|- - - - - - - - - - - - - - |- - - point of no return - - - - |- -
//!      v                             v                       v       v
//!   Resuming                     Resuming      CompletedStopped   Resuming (inconsistent)
//!      v                             v                               v
//!   Completed                    Completed                        Inconsistent
//!
//!   to another node:
//!   Sealing --> Offered --> Committing --> LettingGo --> HandedOver
//!                                \-- the destination refused --> Unwinding
//!
//!   a failure anywhere, Cancel before the line: Unwinding -> Aborted (devices run) or Lost (one does not)
//! ```
//!
//! Phases that the plan does not ask for are skipped. The complete picture, with every command, is in
//! `docs/save.mmd`.
//!
//! # The point of no return
//!
//! It is the decision to let go of the stop point: entering [`SaveState::Resuming`] or
//! [`SaveState::CompletedStopped`] with a sealed checkpoint. Before it, the save can be cancelled, and an
//! undone save leaves running devices and no checkpoint. After it, Cancel is refused and the checkpoint
//! stands whatever happens, so even a save that then fails says which checkpoint there is. A checkpoint that
//! is sealed but not past that point is discarded only once the devices run again, since until then it may be
//! the only copy.
//!
//! A hand-over to another node has another such point: entering [`SaveState::Committing`]. From there on the
//! destination may run the state at any moment, so nothing but its answer moves the save: Cancel is refused, a timer
//! is ignored, and silence is no answer. If it refuses, the devices run again. [`handover`](crate::handover) has the
//! other side.
//!
//! Cancel has no say in [`SaveState::Marking`] either: the hold is over, and the devices resume anyway.
//!
//! # Invariants
//!
//! - No device is stopped before all are quiesced, if the plan has a barrier.
//! - Success means that every device of the set was drained and the seal is durable.
//! - A failure never turns into success. Devices that run again after a failure are [`SaveState::Aborted`].
//! - When a hold expires, the checkpoint is marked before any device runs.
//! - What was offered runs here again only while the destination was not told, or once it has refused.
//! - Devices are let go of only once the destination runs.
//!
//! # Failure paths
//!
//! Every failure before the end leads to [`SaveState::Unwinding`], the one place where devices are brought
//! back. Further failures there change nothing: the first error is the one that is reported. Reports of a
//! command that was overtaken by Cancel arrive there too and are no-ops, except that a seal which became
//! durable meanwhile is remembered. A failed marking is undone like any other failure: devices resume, and
//! the checkpoint is discarded rather than left looking sound.

mod event;
mod plan;
mod state;

pub use event::{SaveCommand, SaveEvent};
pub use plan::{AfterSave, Cutover, SavePlan, SaveRequest};
pub use state::{Fate, SaveState, Validity};

use crate::Step;
use crate::step::Verdict::{self, Ignore, Move, Refuse};

/// The answer of a save to an event.
pub type SaveStep = Step<SaveState, SaveEvent, SaveCommand>;

type Answer = Verdict<SaveState, SaveCommand>;

impl SaveState {
    /// Takes an event. The plan must be the same for the whole operation.
    pub fn on(self, plan: SavePlan, event: SaveEvent) -> SaveStep {
        let answer = match event {
            SaveEvent::Start => self.on_start(plan),
            SaveEvent::CutoverDue => self.on_cutover_due(plan),
            SaveEvent::Cutover => self.on_cutover(plan),
            SaveEvent::AllQuiesced => {
                self.on_report(Self::Quiescing, Move(Self::Stopping, SaveCommand::EnterStopCopy))
            }
            SaveEvent::AllStopped => self.on_report(Self::Stopping, Move(Self::Draining, SaveCommand::Drain)),
            SaveEvent::AllDrained => self.on_report(Self::Draining, Move(Self::Parking, SaveCommand::Park)),
            SaveEvent::AllParked => self.on_report(Self::Parking, Move(Self::Sealing, SaveCommand::Seal)),
            SaveEvent::Sealed => self.on_sealed(plan),
            SaveEvent::Resume => self.on_resume(plan),
            SaveEvent::HoldExpired => self.on_hold_expired(plan),
            SaveEvent::Marked => self.on_report(Self::Marking, resume(Validity::Inconsistent)),
            SaveEvent::AllRunning => self.on_all_running(),
            SaveEvent::CommitDue => self.on_commit_due(plan),
            SaveEvent::Committed => self.on_answer(plan, Move(Self::LettingGo, SaveCommand::LetGo)),
            SaveEvent::Refused => self.on_answer(plan, unwind(Fate::Unsealed)),
            SaveEvent::LetGo => self.on_let_go(plan),
            SaveEvent::Cancel => self.on_cancel(),
            SaveEvent::Failed => self.on_failed(),
            SaveEvent::Recovered => self.on_recovered(),
            SaveEvent::Unrecoverable => self.on_unrecoverable(),
        };
        answer.about(self, event)
    }

    fn on_start(self, plan: SavePlan) -> Answer {
        if self != Self::Admitted {
            return Refuse;
        }
        if plan.pre_copy {
            return Move(Self::PreCopying, SaveCommand::EnterPreCopy);
        }
        match plan.cutover {
            Cutover::Manual => Move(Self::AwaitingCutover, SaveCommand::AwaitCutover),
            Cutover::Auto => cut_over(plan),
        }
    }

    /// The executor's own opinion moves an automatic cutover only; a manual one belongs to the caller alone.
    fn on_cutover_due(self, plan: SavePlan) -> Answer {
        match self {
            Self::PreCopying if plan.cutover == Cutover::Auto => cut_over(plan),
            Self::PreCopying
            | Self::AwaitingCutover
            | Self::Quiescing
            | Self::Stopping
            | Self::Draining
            | Self::Parking
            | Self::Sealing
            | Self::Held
            | Self::Marking
            | Self::Resuming { .. }
            | Self::Offered
            | Self::Committing
            | Self::LettingGo
            | Self::Unwinding { .. } => Ignore,
            Self::Admitted
            | Self::Completed
            | Self::CompletedStopped
            | Self::Inconsistent
            | Self::HandedOver
            | Self::Aborted { .. }
            | Self::Lost { .. } => Refuse,
        }
    }

    /// A repeated call is a no-op as long as the first one had its effect; once that is undone, the caller
    /// must know.
    fn on_cutover(self, plan: SavePlan) -> Answer {
        if plan.cutover == Cutover::Auto {
            return Refuse;
        }
        match self {
            Self::Admitted | Self::Unwinding { .. } | Self::Aborted { .. } | Self::Lost { .. } => Refuse,
            Self::PreCopying | Self::AwaitingCutover => cut_over(plan),
            Self::Quiescing
            | Self::Stopping
            | Self::Draining
            | Self::Parking
            | Self::Sealing
            | Self::Held
            | Self::Marking
            | Self::Resuming { .. }
            | Self::Offered
            | Self::Committing
            | Self::LettingGo
            | Self::Completed
            | Self::CompletedStopped
            | Self::Inconsistent
            | Self::HandedOver => Ignore,
        }
    }

    /// A seal that became durable after all is remembered in an unwinding: it may be the last copy. What a
    /// destination has loaded is none: nobody tells it to run.
    fn on_sealed(self, plan: SavePlan) -> Answer {
        if self == (Self::Unwinding { checkpoint: Fate::Unsealed }) {
            return match plan.after {
                AfterSave::HandOver => Ignore,
                AfterSave::Resume | AfterSave::Hold | AfterSave::StayStopped => {
                    unwind(Fate::Revocable(Validity::Consistent))
                }
            };
        }
        let then = match plan.after {
            AfterSave::Resume => resume(Validity::Consistent),
            AfterSave::Hold => Move(Self::Held, SaveCommand::AwaitResume),
            AfterSave::StayStopped => Move(Self::CompletedStopped, SaveCommand::Release),
            AfterSave::HandOver => Move(Self::Offered, SaveCommand::AwaitCommit),
        };
        self.on_report(Self::Sealing, then)
    }

    /// After the hold has expired this is refused, so that no caller takes an inconsistent checkpoint for a
    /// good one.
    fn on_resume(self, plan: SavePlan) -> Answer {
        if plan.after != AfterSave::Hold {
            return Refuse;
        }
        match self {
            Self::Held => resume(Validity::Consistent),
            Self::Resuming { checkpoint: Validity::Consistent } | Self::Completed => Ignore,
            Self::Admitted
            | Self::PreCopying
            | Self::AwaitingCutover
            | Self::Quiescing
            | Self::Stopping
            | Self::Draining
            | Self::Parking
            | Self::Sealing
            | Self::Marking
            | Self::Resuming { checkpoint: Validity::Inconsistent }
            | Self::Offered
            | Self::Committing
            | Self::LettingGo
            | Self::Unwinding { .. }
            | Self::CompletedStopped
            | Self::Inconsistent
            | Self::HandedOver
            | Self::Aborted { .. }
            | Self::Lost { .. } => Refuse,
        }
    }

    /// The timer may lose the race against Resume, a commit, Cancel or a failure. An offer that nobody commits
    /// is withdrawn.
    fn on_hold_expired(self, plan: SavePlan) -> Answer {
        match plan.after {
            AfterSave::Hold | AfterSave::HandOver => {}
            AfterSave::Resume | AfterSave::StayStopped => return Refuse,
        }
        match self {
            Self::Held => Move(Self::Marking, SaveCommand::MarkInconsistent),
            Self::Offered => unwind(Fate::Unsealed),
            Self::Marking
            | Self::Resuming { .. }
            | Self::Committing
            | Self::LettingGo
            | Self::Unwinding { .. } => Ignore,
            Self::Admitted
            | Self::PreCopying
            | Self::AwaitingCutover
            | Self::Quiescing
            | Self::Stopping
            | Self::Draining
            | Self::Parking
            | Self::Sealing
            | Self::Completed
            | Self::CompletedStopped
            | Self::Inconsistent
            | Self::HandedOver
            | Self::Aborted { .. }
            | Self::Lost { .. } => Refuse,
        }
    }

    /// A repeated call is a no-op while the first one has its effect, and refused once that is undone.
    fn on_commit_due(self, plan: SavePlan) -> Answer {
        if plan.after != AfterSave::HandOver {
            return Refuse;
        }
        match self {
            Self::Offered => Move(Self::Committing, SaveCommand::Commit),
            Self::Committing | Self::LettingGo | Self::HandedOver => Ignore,
            Self::Admitted
            | Self::PreCopying
            | Self::AwaitingCutover
            | Self::Quiescing
            | Self::Stopping
            | Self::Draining
            | Self::Parking
            | Self::Sealing
            | Self::Held
            | Self::Marking
            | Self::Resuming { .. }
            | Self::Unwinding { .. }
            | Self::Completed
            | Self::CompletedStopped
            | Self::Inconsistent
            | Self::Aborted { .. }
            | Self::Lost { .. } => Refuse,
        }
    }

    /// The destination's answer, or an administrator's. Nothing overtakes it, so a second one is a defect.
    fn on_answer(self, plan: SavePlan, then: Answer) -> Answer {
        if plan.after == AfterSave::HandOver && self == Self::Committing { then } else { Refuse }
    }

    fn on_let_go(self, plan: SavePlan) -> Answer {
        if plan.after == AfterSave::HandOver && self == Self::LettingGo {
            Move(Self::HandedOver, SaveCommand::Release)
        } else {
            Refuse
        }
    }

    fn on_all_running(self) -> Answer {
        let consistent = Self::Resuming { checkpoint: Validity::Consistent };
        if self == consistent {
            return Move(Self::Completed, SaveCommand::Release);
        }
        let inconsistent = Self::Resuming { checkpoint: Validity::Inconsistent };
        self.on_report(inconsistent, Move(Self::Inconsistent, SaveCommand::Release))
    }

    fn on_cancel(self) -> Answer {
        match self {
            Self::Admitted | Self::AwaitingCutover => {
                Move(Self::Aborted { checkpoint: None }, SaveCommand::Release)
            }
            Self::PreCopying
            | Self::Quiescing
            | Self::Stopping
            | Self::Draining
            | Self::Parking
            | Self::Sealing
            | Self::Offered => unwind(Fate::Unsealed),
            Self::Held => unwind(Fate::Revocable(Validity::Consistent)),
            Self::Unwinding { checkpoint: Fate::Unsealed | Fate::Revocable(_) }
            | Self::Aborted { checkpoint: None } => Ignore,
            Self::Marking
            | Self::Resuming { .. }
            | Self::Committing
            | Self::LettingGo
            | Self::Unwinding { checkpoint: Fate::Stands(_) }
            | Self::Completed
            | Self::CompletedStopped
            | Self::Inconsistent
            | Self::HandedOver
            | Self::Aborted { checkpoint: Some(_) }
            | Self::Lost { .. } => Refuse,
        }
    }

    /// In [`SaveState::Committing`] one thing alone can fail: to record it. Then the destination was not told, and
    /// is not going to be.
    fn on_failed(self) -> Answer {
        match self {
            Self::Admitted => Move(Self::Aborted { checkpoint: None }, SaveCommand::Release),
            Self::PreCopying
            | Self::AwaitingCutover
            | Self::Quiescing
            | Self::Stopping
            | Self::Draining
            | Self::Parking
            | Self::Sealing
            | Self::Offered
            | Self::Committing => unwind(Fate::Unsealed),
            Self::Held => unwind(Fate::Revocable(Validity::Consistent)),
            Self::Marking => unwind(Fate::Revocable(Validity::Inconsistent)),
            Self::Resuming { checkpoint } => unwind(Fate::Stands(checkpoint)),
            Self::Unwinding { .. } => Ignore,
            Self::LettingGo
            | Self::Completed
            | Self::CompletedStopped
            | Self::Inconsistent
            | Self::HandedOver
            | Self::Aborted { .. }
            | Self::Lost { .. } => Refuse,
        }
    }

    fn on_recovered(self) -> Answer {
        let Self::Unwinding { checkpoint } = self else {
            return Refuse;
        };
        match checkpoint {
            Fate::Unsealed | Fate::Revocable(_) => {
                Move(Self::Aborted { checkpoint: None }, SaveCommand::Discard)
            }
            Fate::Stands(validity) => {
                Move(Self::Aborted { checkpoint: Some(validity) }, SaveCommand::Release)
            }
        }
    }

    fn on_unrecoverable(self) -> Answer {
        let Self::Unwinding { checkpoint } = self else {
            return Refuse;
        };
        let checkpoint = match checkpoint {
            Fate::Unsealed => None,
            Fate::Revocable(validity) | Fate::Stands(validity) => Some(validity),
        };
        Move(Self::Lost { checkpoint }, SaveCommand::Quarantine)
    }

    /// A report moves the state that waits for it. In an unwinding it comes from the command that was
    /// overtaken.
    fn on_report(self, awaiting: Self, then: Answer) -> Answer {
        if self == awaiting {
            then
        } else if matches!(self, Self::Unwinding { .. }) {
            Ignore
        } else {
            Refuse
        }
    }
}

const fn cut_over(plan: SavePlan) -> Answer {
    if plan.barrier {
        Move(SaveState::Quiescing, SaveCommand::Quiesce)
    } else {
        Move(SaveState::Stopping, SaveCommand::EnterStopCopy)
    }
}

const fn resume(checkpoint: Validity) -> Answer {
    Move(SaveState::Resuming { checkpoint }, SaveCommand::Resume)
}

const fn unwind(checkpoint: Fate) -> Answer {
    Move(SaveState::Unwinding { checkpoint }, SaveCommand::FallBack)
}
