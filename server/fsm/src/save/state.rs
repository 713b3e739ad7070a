//! Where a save stands.

use std::fmt;

use crate::Outcome;

/// What a sealed checkpoint is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Validity {
    /// It is the state of the devices at the moment they stopped, and they stayed stopped as long as the
    /// caller wanted.
    Consistent,
    /// The hold expired before the caller said Resume, so memory that it captured may have moved on.
    Inconsistent,
}

/// What becomes of the checkpoint of a save that is being undone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Fate {
    /// Not sealed, so not a checkpoint: discarded.
    Unsealed,
    /// Sealed before the point of no return: discarded once the devices run again. If they do not, it is the
    /// last copy of their state, and stays.
    Revocable(Validity),
    /// Past the point of no return: stays.
    Stands(Validity),
}

/// Where a save of a set of devices stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SaveState {
    /// Planned, and the devices are leased. Nothing has been touched.
    Admitted,
    /// Every device is in `PRE_COPY` or on its way, and its stream is being read.
    PreCopying,
    /// Without pre-copy: the devices run untouched until the caller says Cutover.
    AwaitingCutover,
    /// Devices are on their way to `RUNNING_P2P` or `PRE_COPY_P2P`; none has been stopped.
    Quiescing,
    /// Devices are on their way to `STOP_COPY`. The downtime begins.
    Stopping,
    /// Every device is in `STOP_COPY` and its stream is read to the end.
    Draining,
    /// All bytes are out. Devices are on their way from `STOP_COPY` to `STOP`, where their configuration
    /// space, which must not be touched in `STOP_COPY`, can be captured.
    Parking,
    /// Every device is in `STOP`. Lengths and digests are being made final.
    Sealing,
    /// Every device is in `STOP` until the caller says Resume or the hold expires.
    Held,
    /// The hold expired. The checkpoint is being marked before any device runs.
    Marking,
    /// Devices are on their way to `RUNNING`. Past the point of no return: the checkpoint stands.
    Resuming {
        /// What it is worth.
        checkpoint: Validity,
    },
    /// Every device is in `STOP`, and the destination has all of their state loaded and verified. It does not
    /// run it, and will not before it is told to.
    Offered,
    /// The decision to hand over is on record, and the destination may have been told. Only its answer leads
    /// on: until that is known, nobody can say which side runs.
    Committing,
    /// The destination runs. The devices here are being reset.
    LettingGo,
    /// The save failed or was cancelled. Devices are on their way back to `RUNNING`.
    Unwinding {
        /// What becomes of the checkpoint.
        checkpoint: Fate,
    },
    /// Terminal: the devices run, and the checkpoint is sealed.
    Completed,
    /// Terminal: the devices are in `STOP` as was asked for, and the checkpoint is sealed.
    CompletedStopped,
    /// Terminal: the devices run, and the checkpoint is sealed and marked inconsistent.
    Inconsistent,
    /// Terminal: the devices of the destination run with the state, and nothing of it is left here.
    HandedOver,
    /// Terminal: the save was undone. The devices run with their own state.
    Aborted {
        /// The checkpoint that stays, if the save failed only after the point of no return.
        checkpoint: Option<Validity>,
    },
    /// Terminal: at least one device could not be brought back. It is quarantined, and its state counts as
    /// lost.
    Lost {
        /// The checkpoint that stays, if it was sealed.
        checkpoint: Option<Validity>,
    },
}

impl SaveState {
    /// All states, in the order in which a save may pass them.
    pub const ALL: [Self; 30] = [
        Self::Admitted,
        Self::PreCopying,
        Self::AwaitingCutover,
        Self::Quiescing,
        Self::Stopping,
        Self::Draining,
        Self::Parking,
        Self::Sealing,
        Self::Held,
        Self::Marking,
        Self::Resuming { checkpoint: Validity::Consistent },
        Self::Resuming { checkpoint: Validity::Inconsistent },
        Self::Offered,
        Self::Committing,
        Self::LettingGo,
        Self::Unwinding { checkpoint: Fate::Unsealed },
        Self::Unwinding { checkpoint: Fate::Revocable(Validity::Consistent) },
        Self::Unwinding { checkpoint: Fate::Revocable(Validity::Inconsistent) },
        Self::Unwinding { checkpoint: Fate::Stands(Validity::Consistent) },
        Self::Unwinding { checkpoint: Fate::Stands(Validity::Inconsistent) },
        Self::Completed,
        Self::CompletedStopped,
        Self::Inconsistent,
        Self::HandedOver,
        Self::Aborted { checkpoint: None },
        Self::Aborted { checkpoint: Some(Validity::Consistent) },
        Self::Aborted { checkpoint: Some(Validity::Inconsistent) },
        Self::Lost { checkpoint: None },
        Self::Lost { checkpoint: Some(Validity::Consistent) },
        Self::Lost { checkpoint: Some(Validity::Inconsistent) },
    ];

    /// Whether the save is over.
    pub const fn is_terminal(self) -> bool {
        self.outcome().is_some()
    }

    /// What became of the state in the devices, once the save is over.
    pub const fn outcome(self) -> Option<Outcome> {
        match self {
            Self::Completed
            | Self::CompletedStopped
            | Self::Inconsistent
            | Self::HandedOver
            | Self::Aborted { .. } => Some(Outcome::Preserved),
            Self::Lost { .. } => Some(Outcome::StateLost),
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
            | Self::Offered
            | Self::Committing
            | Self::LettingGo
            | Self::Unwinding { .. } => None,
        }
    }

    /// Whether the save did what was asked for. An inconsistent checkpoint is not what was asked for.
    pub const fn is_success(self) -> bool {
        match self {
            Self::Completed | Self::CompletedStopped | Self::HandedOver => true,
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
            | Self::Offered
            | Self::Committing
            | Self::LettingGo
            | Self::Unwinding { .. }
            | Self::Inconsistent
            | Self::Aborted { .. }
            | Self::Lost { .. } => false,
        }
    }

    /// Whether what was saved stands whatever happens to the devices from here on.
    ///
    /// Not so in [`SaveState::Committing`], although there is no way back at will: the destination can refuse, and
    /// then the devices run again.
    pub const fn is_past_no_return(self) -> bool {
        match self {
            Self::Resuming { .. }
            | Self::LettingGo
            | Self::Unwinding { checkpoint: Fate::Stands(_) }
            | Self::Completed
            | Self::CompletedStopped
            | Self::Inconsistent
            | Self::HandedOver
            | Self::Aborted { checkpoint: Some(_) }
            | Self::Lost { checkpoint: Some(_) } => true,
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
            | Self::Offered
            | Self::Committing
            | Self::Unwinding { checkpoint: Fate::Unsealed | Fate::Revocable(_) }
            | Self::Aborted { checkpoint: None }
            | Self::Lost { checkpoint: None } => false,
        }
    }

    /// The state's name, with what is known of the checkpoint where that makes a difference.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Admitted => "Admitted",
            Self::PreCopying => "PreCopying",
            Self::AwaitingCutover => "AwaitingCutover",
            Self::Quiescing => "Quiescing",
            Self::Stopping => "Stopping",
            Self::Draining => "Draining",
            Self::Parking => "Parking",
            Self::Sealing => "Sealing",
            Self::Held => "Held",
            Self::Marking => "Marking",
            Self::Resuming { checkpoint: Validity::Consistent } => "Resuming",
            Self::Resuming { checkpoint: Validity::Inconsistent } => "Resuming (inconsistent)",
            Self::Offered => "Offered",
            Self::Committing => "Committing",
            Self::LettingGo => "LettingGo",
            Self::Unwinding { checkpoint: Fate::Unsealed } => "Unwinding (unsealed)",
            Self::Unwinding { checkpoint: Fate::Revocable(Validity::Consistent) } => "Unwinding (revocable)",
            Self::Unwinding { checkpoint: Fate::Revocable(Validity::Inconsistent) } => {
                "Unwinding (revocable, inconsistent)"
            }
            Self::Unwinding { checkpoint: Fate::Stands(Validity::Consistent) } => "Unwinding (stands)",
            Self::Unwinding { checkpoint: Fate::Stands(Validity::Inconsistent) } => {
                "Unwinding (stands, inconsistent)"
            }
            Self::Completed => "Completed",
            Self::CompletedStopped => "CompletedStopped",
            Self::Inconsistent => "Inconsistent",
            Self::HandedOver => "HandedOver",
            Self::Aborted { checkpoint: None } => "Aborted",
            Self::Aborted { checkpoint: Some(Validity::Consistent) } => "Aborted (checkpoint stands)",
            Self::Aborted { checkpoint: Some(Validity::Inconsistent) } => "Aborted (inconsistent stands)",
            Self::Lost { checkpoint: None } => "Lost",
            Self::Lost { checkpoint: Some(Validity::Consistent) } => "Lost (checkpoint stands)",
            Self::Lost { checkpoint: Some(Validity::Inconsistent) } => "Lost (inconsistent stands)",
        }
    }
}

impl fmt::Display for SaveState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
