//! What happens to a restore, and what the executor is told to do about it.

use std::fmt;

use crate::{RestorePlan, State};

/// Something that happened: a call, a timer, or the executor's report on the command it was given.
///
/// A device is in a state when it was read back there. That a SET returned success is no proof: one driver
/// says so of every SET while its device is in `ERROR`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RestoreEvent {
    /// Begin.
    Start,
    /// Report: every device is in `RESUMING`.
    AllEntered,
    /// Report: every chunk of every stream was written.
    AllLoaded,
    /// Report: lengths and digests of every stream are those of the seal.
    SealVerified,
    /// Report: what the streams do not carry is set on every device.
    FixedUp,
    /// Call: the owner of interrupts and mappings has mapped its memory and armed its interrupts.
    Ready,
    /// Call: run the devices.
    Resume,
    /// Timer: the deadline of the hold, or of the wait for Ready, has passed.
    HoldExpired,
    /// Report: every device is in `RUNNING_P2P`.
    AllQuiesced,
    /// Report: a device was found in `RUNNING`, and not all are. It goes before any report of a failure.
    AnyRunning,
    /// Report: every device is in `RUNNING`.
    AllRunning,
    /// Call: undo the restore.
    Cancel,
    /// Report: the command at hand failed, whatever it was. The first one carries the error to be reported.
    Failed,
    /// Report: after an unwinding, every device is in `RUNNING` with its old state.
    Recovered,
    /// Report: every device is in `RUNNING`, at least one of them by a reset.
    AllReset,
    /// Report: at least one device could be neither brought back nor reset.
    Unrecoverable,
}

impl RestoreEvent {
    /// All events.
    pub const ALL: [Self; 16] = [
        Self::Start,
        Self::AllEntered,
        Self::AllLoaded,
        Self::SealVerified,
        Self::FixedUp,
        Self::Ready,
        Self::Resume,
        Self::HoldExpired,
        Self::AllQuiesced,
        Self::AnyRunning,
        Self::AllRunning,
        Self::Cancel,
        Self::Failed,
        Self::Recovered,
        Self::AllReset,
        Self::Unrecoverable,
    ];
}

impl fmt::Display for RestoreEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What the executor does next. It takes the place of the command before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RestoreCommand {
    /// Move every device to `RESUMING`, each in one SET, and report [`RestoreEvent::AllEntered`].
    EnterResuming,
    /// Write verified chunks to every device and report [`RestoreEvent::AllLoaded`]. A write that failed is
    /// final.
    Load,
    /// Compare lengths and digests with the seal and report [`RestoreEvent::SealVerified`].
    Verify,
    /// Set what the streams do not carry and report [`RestoreEvent::FixedUp`].
    FixUp,
    /// Tell the caller that the devices are loaded and held, arm the deadline unless it is armed, and wait
    /// for Resume.
    AwaitResume,
    /// Wait for Ready. Arm the deadline unless it is armed.
    AwaitReady,
    /// Move every device to `RUNNING_P2P` and report [`RestoreEvent::AllQuiesced`].
    EnterP2p,
    /// Move every device to `RUNNING`. Report [`RestoreEvent::AllRunning`], or [`RestoreEvent::AnyRunning`]
    /// as soon as a device is found there and others are not.
    Resume,
    /// Go on with the devices that do not run yet, and report [`RestoreEvent::AllRunning`].
    FinishResume,
    /// Read back the state of every device and follow [`crate::recover_entry`] for each; one that did enter
    /// `RESUMING` is reset. Report [`RestoreEvent::Recovered`], [`RestoreEvent::AllReset`] or
    /// [`RestoreEvent::Unrecoverable`].
    UndoEntry,
    /// Follow [`crate::recover`] as a destination for every device, which resets it. Report
    /// [`RestoreEvent::AllReset`] or [`RestoreEvent::Unrecoverable`].
    ResetAll,
    /// The end: disarm the deadline, close the data fds, give back the leases.
    Release,
    /// The end, as [`RestoreCommand::Release`], but keep the leases of the whole set and tell an
    /// administrator.
    Quarantine,
}

impl RestoreCommand {
    /// The states that the command moves the set through.
    ///
    /// `STOP` is never among them. The kernel passes it on the way into and out of `RESUMING`, but a loaded
    /// device must not stay there: some drivers set up their queues anew when it does.
    pub const fn targets(self, plan: RestorePlan) -> &'static [State] {
        match self {
            Self::EnterResuming => &[State::Resuming],
            Self::EnterP2p => &[State::RunningP2p],
            // A reset lands in RUNNING by itself; only a device that kept its old state walks.
            Self::UndoEntry if plan.barrier => &[State::RunningP2p, State::Running],
            Self::UndoEntry | Self::Resume | Self::FinishResume => &[State::Running],
            Self::Load
            | Self::Verify
            | Self::FixUp
            | Self::AwaitResume
            | Self::AwaitReady
            | Self::ResetAll
            | Self::Release
            | Self::Quarantine => &[],
        }
    }
}

impl fmt::Display for RestoreCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
