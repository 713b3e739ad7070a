//! Where a restore stands.

use std::fmt;

use crate::Outcome;

/// Where a restore of a set of devices stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RestoreState {
    /// Planned, and the devices are leased. Nothing has been touched.
    Admitted,
    /// Devices are on their way to `RESUMING`. Some may still hold their old state.
    Entering,
    /// Every device is in `RESUMING`, its old state is gone, and verified chunks are written to it.
    Loading,
    /// All bytes are in. Their lengths and digests are compared with the seal.
    Verifying,
    /// The seal is verified. What the stream does not carry is set, such as the permitted bits of
    /// `PCI_COMMAND`.
    FixingUp,
    /// Every device is loaded and waits in `RESUMING` until the caller says Resume or the hold expires.
    Held {
        /// Whether the owner of interrupts and mappings has said Ready meanwhile.
        ready: bool,
    },
    /// The devices may run as soon as the owner of interrupts and mappings says Ready.
    AwaitingReady,
    /// Devices are on their way to `RUNNING_P2P`. None runs freely.
    Quiescing,
    /// Devices are on their way to `RUNNING`. None has been found there.
    Resuming,
    /// At least one device was found in `RUNNING`, but not all. Past the point of no return.
    PartlyRunning,
    /// The restore failed or was cancelled on entry. Devices that kept their old state go back to `RUNNING`
    /// with it, the others are being reset.
    Unwinding,
    /// The restore failed, was cancelled, or its hold expired. Every device is being reset.
    Resetting,
    /// Terminal: every device runs with the restored state.
    Completed,
    /// Terminal: the restore was undone, and nothing of it runs.
    Aborted {
        /// What became of the state that was in the devices before.
        outcome: Outcome,
    },
    /// Terminal: a device could not be reset, or only a part of the set runs. Nothing moves until somebody
    /// decides.
    Quarantined,
}

impl RestoreState {
    /// All states, in the order in which a restore may pass them.
    pub const ALL: [Self; 17] = [
        Self::Admitted,
        Self::Entering,
        Self::Loading,
        Self::Verifying,
        Self::FixingUp,
        Self::Held { ready: false },
        Self::Held { ready: true },
        Self::AwaitingReady,
        Self::Quiescing,
        Self::Resuming,
        Self::PartlyRunning,
        Self::Unwinding,
        Self::Resetting,
        Self::Completed,
        Self::Aborted { outcome: Outcome::Preserved },
        Self::Aborted { outcome: Outcome::StateLost },
        Self::Quarantined,
    ];

    /// Whether the restore is over.
    pub const fn is_terminal(self) -> bool {
        match self {
            Self::Completed | Self::Aborted { .. } | Self::Quarantined => true,
            Self::Admitted
            | Self::Entering
            | Self::Loading
            | Self::Verifying
            | Self::FixingUp
            | Self::Held { .. }
            | Self::AwaitingReady
            | Self::Quiescing
            | Self::Resuming
            | Self::PartlyRunning
            | Self::Unwinding
            | Self::Resetting => false,
        }
    }

    /// Whether every device runs with the restored state.
    pub const fn is_success(self) -> bool {
        matches!(self, Self::Completed)
    }

    /// Whether the restored state may have acted on the world, so that it cannot be taken back.
    pub const fn is_past_no_return(self) -> bool {
        match self {
            Self::PartlyRunning | Self::Completed | Self::Quarantined => true,
            Self::Admitted
            | Self::Entering
            | Self::Loading
            | Self::Verifying
            | Self::FixingUp
            | Self::Held { .. }
            | Self::AwaitingReady
            | Self::Quiescing
            | Self::Resuming
            | Self::Unwinding
            | Self::Resetting
            | Self::Aborted { .. } => false,
        }
    }

    /// The state's name, with what else is known where that makes a difference.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Admitted => "Admitted",
            Self::Entering => "Entering",
            Self::Loading => "Loading",
            Self::Verifying => "Verifying",
            Self::FixingUp => "FixingUp",
            Self::Held { ready: false } => "Held",
            Self::Held { ready: true } => "Held (ready)",
            Self::AwaitingReady => "AwaitingReady",
            Self::Quiescing => "Quiescing",
            Self::Resuming => "Resuming",
            Self::PartlyRunning => "PartlyRunning",
            Self::Unwinding => "Unwinding",
            Self::Resetting => "Resetting",
            Self::Completed => "Completed",
            Self::Aborted { outcome: Outcome::Preserved } => "Aborted (preserved)",
            Self::Aborted { outcome: Outcome::StateLost } => "Aborted (state lost)",
            Self::Quarantined => "Quarantined",
        }
    }
}

impl fmt::Display for RestoreState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
