//! Who may run a logical device that is on its way from one node to another.
//!
//! ```text
//!   source: SaveState, HAND_OVER                  destination: RestoreState, with a hold
//!                 --- Open, state, seals --->     Entering .. FixingUp     LOADING
//!   Offered       <-------- Prepared --------     Held                     PREPARED
//!   Committing    --------- Commit --------->     Quiescing, Resuming      COMMITTING
//!   LettingGo     <------- Committed --------     Completed                over: COMMITTED
//!   Unwinding     <-------- Refused ---------     Aborted                  over: REFUSED
//!   (waits for an administrator)   <--------     Quarantined, or a crash  over: LOST, BROKEN
//! ```
//! Both machines are those of any save and restore. Here is what is particular to a pair of them: what each side has
//! on record before it acts, what the destination answers, and what an administrator may decide. The page for whoever
//! writes another side of it is `docs/handover.md`.
//!
//! # Invariants
//! - A verdict is given once and never changes: it is the end of the arrival's record.
//! - The source runs its devices again only before Commit was sent, after [`Verdict::Refused`], or on the word of an
//!   administrator who has evidence.
//! - The source lets its devices go only after [`Verdict::Committed`], or on such a word.
//! - A command is executed once its record is durable, and not before. A write that failed may be durable all the
//!   same, so it counts as made: `on_move` is asked of the step that was to be written, and no device of the source runs
//!   again before [`OfferStep::Begun`] stands over a [`OfferStep::Committing`] that may be there. Where the failure of a
//!   write moves nothing, the write is made again.
//! - Kept means kept ever since: a device that had to be opened anew before the end was on record does not count as kept
//!   in the next crash. It was reset, and looks like one that runs.
//! - [`Verdict::Refused`] means that nothing at the destination runs the state, or ever will.
//!
//! # Failure paths
//! Silence leaves the source in [`SaveState::Committing`], with its devices stopped. A destination that comes back
//! from a crash in [`ArrivalStep::Committing`] without its devices cannot tell whether they had run:
//! [`Verdict::Lost`]. One of which only a part runs, or that cannot bring its devices to where nothing of the state
//! runs, is [`Verdict::Broken`]. Neither lets the source go on by itself.

use std::fmt;

use crate::{RestoreState, SaveEvent, SaveState};

/// How a hand-over ended at the destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    /// Every device runs with the state.
    Committed,
    /// No device runs with the state, and none will.
    Refused,
    /// The devices may have run, and what they had is gone. None runs with the state, and none will.
    Lost,
    /// Some device may run with the state, and not all do. Nothing moves there until somebody decides.
    Broken,
}

/// What the destination has on record of an arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ArrivalStep {
    /// State is on its way into the devices.
    Loading,
    /// All is loaded and verified, and waits in `RESUMING` for Commit.
    Prepared,
    /// Commit came; devices may leave `RESUMING` at any moment.
    Committing,
    /// A device did not leave `RESUMING`, and none was found in `RUNNING`: all are being reset.
    Reverting,
    /// Over.
    Over(Verdict),
}

/// How the devices of an arrival ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ArrivalEnd {
    /// Every device was found in `RUNNING` with the state.
    AllRunning,
    /// Every device was reset, or was never touched.
    AllReset,
    /// A device could be neither run nor reset.
    Quarantined,
    /// The agent ended, and devices were not kept open meanwhile, which resets them; those that were kept were reset.
    NotKept,
}

/// What is done about a Commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CommitAnswer {
    /// Refused as a call, and nothing is decided by it: the source has not been told Prepared.
    NotPrepared,
    /// The devices are run, and the answer is what comes of it.
    Run,
    /// It is being done; the answer is what comes of it.
    Wait,
    /// The answer.
    Told(Verdict),
}

/// What becomes of an arrival after the agent has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ArrivalTakeUp {
    /// Every device is reset: [`ArrivalEnd::AllReset`], or [`ArrivalEnd::Quarantined`].
    Reset,
    /// It waits on for Commit, until its deadline.
    Wait,
    /// The devices go on to `RUNNING`.
    GoOn,
    /// It ended so.
    Ended(Verdict),
}

impl ArrivalStep {
    /// What is put on record before the command is executed that comes with a move to `to`; none where it is not.
    pub const fn on_move(self, to: RestoreState) -> Option<Self> {
        let next = match to {
            RestoreState::Entering => Self::Loading,
            RestoreState::Held { .. } => Self::Prepared,
            RestoreState::Quiescing | RestoreState::Resuming => Self::Committing,
            RestoreState::Resetting => match self {
                Self::Committing | Self::Reverting => Self::Reverting,
                Self::Loading | Self::Prepared | Self::Over(_) => Self::Loading,
            },
            RestoreState::Admitted
            | RestoreState::Loading
            | RestoreState::Verifying
            | RestoreState::FixingUp
            | RestoreState::AwaitingReady
            | RestoreState::PartlyRunning
            | RestoreState::Unwinding
            | RestoreState::Completed
            | RestoreState::Aborted { .. }
            | RestoreState::Quarantined => return None,
        };
        match (self, next) {
            (Self::Over(_), _)
            | (Self::Loading, Self::Loading)
            | (Self::Prepared, Self::Prepared)
            | (Self::Committing, Self::Committing)
            | (Self::Reverting, Self::Reverting) => None,
            (Self::Loading | Self::Prepared | Self::Committing | Self::Reverting, next) => Some(next),
        }
    }

    /// The verdict on an arrival whose devices ended so. The first one stays.
    pub const fn verdict(self, end: ArrivalEnd) -> Verdict {
        match (self, end) {
            (Self::Over(verdict), _) => verdict,
            (_, ArrivalEnd::AllRunning) => Verdict::Committed,
            (Self::Committing, ArrivalEnd::NotKept) => Verdict::Lost,
            // What a device does that left RESUMING, or was told to, and then resisted, nobody can tell.
            (Self::Committing | Self::Reverting, ArrivalEnd::Quarantined) => Verdict::Broken,
            // In RESUMING and in ERROR nothing runs, and no way but a reset leads out.
            (Self::Loading | Self::Prepared, ArrivalEnd::Quarantined)
            | (Self::Loading | Self::Prepared | Self::Reverting, ArrivalEnd::NotKept)
            | (_, ArrivalEnd::AllReset) => Verdict::Refused,
        }
    }

    /// What is done about a Commit with the right epoch.
    pub const fn on_commit(self) -> CommitAnswer {
        match self {
            Self::Loading => CommitAnswer::NotPrepared,
            Self::Prepared => CommitAnswer::Run,
            Self::Committing | Self::Reverting => CommitAnswer::Wait,
            Self::Over(verdict) => CommitAnswer::Told(verdict),
        }
    }

    /// What becomes of it after the agent has ended. `kept` says whether all of its devices were kept open meanwhile.
    pub const fn after_crash(self, kept: bool) -> ArrivalTakeUp {
        match (self, kept) {
            (Self::Over(verdict), _) => ArrivalTakeUp::Ended(verdict),
            (_, false) => ArrivalTakeUp::Ended(self.verdict(ArrivalEnd::NotKept)),
            (Self::Loading | Self::Reverting, true) => ArrivalTakeUp::Reset,
            (Self::Prepared, true) => ArrivalTakeUp::Wait,
            (Self::Committing, true) => ArrivalTakeUp::GoOn,
        }
    }
}

/// What the source has on record of an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OfferStep {
    /// Commit was not sent: it is undone.
    Begun,
    /// Commit may have been sent.
    Committing,
    /// The destination runs, or an administrator said so: the devices are reset.
    LettingGo,
}

/// What becomes of an offer after the agent has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OfferTakeUp {
    /// It is undone, and the destination is told that it is off. Devices that were not kept open were reset: what they
    /// had is lost.
    Undo,
    /// The destination is told to run, and asked, as before, whether the devices here were kept or not.
    AskOn,
    /// The devices are reset, those that are already once more.
    LetGo,
}

impl OfferStep {
    /// What becomes of it after the agent has ended.
    pub const fn after_crash(self) -> OfferTakeUp {
        match self {
            Self::Begun => OfferTakeUp::Undo,
            Self::Committing => OfferTakeUp::AskOn,
            Self::LettingGo => OfferTakeUp::LetGo,
        }
    }

    /// What is put on record before the command is executed that comes with a move to `to`; none where it is not.
    pub const fn on_move(self, to: SaveState) -> Option<Self> {
        let next = match to {
            SaveState::Committing => Self::Committing,
            SaveState::LettingGo => Self::LettingGo,
            SaveState::Unwinding { .. } => Self::Begun,
            SaveState::Admitted
            | SaveState::PreCopying
            | SaveState::AwaitingCutover
            | SaveState::Quiescing
            | SaveState::Stopping
            | SaveState::Draining
            | SaveState::Parking
            | SaveState::Sealing
            | SaveState::Held
            | SaveState::Marking
            | SaveState::Resuming { .. }
            | SaveState::Offered
            | SaveState::Completed
            | SaveState::CompletedStopped
            | SaveState::Inconsistent
            | SaveState::HandedOver
            | SaveState::Aborted { .. }
            | SaveState::Lost { .. } => return None,
        };
        match (self, next) {
            (Self::Begun, Self::Begun)
            | (Self::Committing, Self::Committing)
            | (Self::LettingGo, Self::LettingGo) => None,
            (Self::Begun | Self::Committing | Self::LettingGo, next) => Some(next),
        }
    }
}

impl Verdict {
    /// What the source does about it by itself: nothing where the devices of the destination may have run and do not
    /// all run now. Then it waits for an administrator.
    pub const fn event(self) -> Option<SaveEvent> {
        match self {
            Self::Committed => Some(SaveEvent::Committed),
            Self::Refused => Some(SaveEvent::Refused),
            Self::Lost | Self::Broken => None,
        }
    }

    /// Its name, as it is told and recorded.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Committed => "COMMITTED",
            Self::Refused => "REFUSED",
            Self::Lost => "LOST",
            Self::Broken => "BROKEN",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What the source knows of the destination while it is in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Evidence {
    /// It was not heard, or knows nothing of the hand-over.
    Nothing,
    /// It was heard, and has not decided.
    Undecided,
    /// Its recorded verdict.
    Told(Verdict),
}

/// What an administrator decides about a hand-over in doubt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Resolution {
    /// The devices of the source run again.
    ResumeHere,
    /// The devices of the source are reset: the copy at the destination, if there is one, is the logical device.
    LetGo,
}

/// Why a decision is not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unresolvable {
    /// The destination has not said that it does not run the state, and nobody states that it is fenced.
    MayRunThere,
    /// The destination has said that it runs the state: it goes on there.
    RunsThere,
    /// The destination has not said that it runs the state: what is here may be the last copy.
    MayBeLast,
}

impl fmt::Display for Unresolvable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::MayRunThere => {
                "the destination may run the devices, and two copies must never run: reach it, or state that it is \
                 fenced once it surely is"
            }
            Self::RunsThere => "the destination has said that it runs the devices",
            Self::MayBeLast => {
                "the destination has not said that it runs the devices, so what is here may be the last copy: reach \
                 it, or resume here, or state that the last copy may go"
            }
        })
    }
}

impl std::error::Error for Unresolvable {}

/// What an administrator's decision does, or why it is not taken. `stated` says that the administrator answers for it
/// on record: that the destination is fenced, where the devices are to run here; that the last copy may go, where they
/// are to be let go of.
pub const fn resolve(
    evidence: Evidence,
    resolution: Resolution,
    stated: bool,
) -> Result<SaveEvent, Unresolvable> {
    match (resolution, evidence) {
        (Resolution::ResumeHere, Evidence::Told(Verdict::Refused | Verdict::Lost)) => Ok(SaveEvent::Refused),
        (Resolution::ResumeHere, Evidence::Told(Verdict::Committed)) => Err(Unresolvable::RunsThere),
        (
            Resolution::ResumeHere,
            Evidence::Nothing | Evidence::Undecided | Evidence::Told(Verdict::Broken),
        ) => {
            if stated {
                Ok(SaveEvent::Refused)
            } else {
                Err(Unresolvable::MayRunThere)
            }
        }
        (Resolution::LetGo, Evidence::Told(Verdict::Committed)) => Ok(SaveEvent::Committed),
        (
            Resolution::LetGo,
            Evidence::Nothing
            | Evidence::Undecided
            | Evidence::Told(Verdict::Refused | Verdict::Lost | Verdict::Broken),
        ) => {
            if stated {
                Ok(SaveEvent::Committed)
            } else {
                Err(Unresolvable::MayBeLast)
            }
        }
    }
}
