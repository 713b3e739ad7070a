//! What happens to a save, and what the executor is told to do about it.

use std::fmt;

use crate::{SavePlan, State};

/// Something that happened: a call, a timer, or the executor's report on the command it was given.
///
/// A device is in a state when it was read back there. That a SET returned success is no proof: one driver
/// says so of every SET while its device is in `ERROR`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SaveEvent {
    /// Begin.
    Start,
    /// Timer: the predicted downtime fits, or the budget of rounds or time for pre-copying is spent.
    CutoverDue,
    /// Call: the workload is paused; stop the devices.
    Cutover,
    /// Report: every device is in its quiesced state.
    AllQuiesced,
    /// Report: every device is in `STOP_COPY`.
    AllStopped,
    /// Report: every stream was read to its end, and every byte handed on.
    AllDrained,
    /// Report: every device is in `STOP`, and its configuration space is captured.
    AllParked,
    /// Report: the seal is durable.
    Sealed,
    /// Call: the caller has its memory; run the devices again.
    Resume,
    /// Timer: the deadline of the hold has passed.
    HoldExpired,
    /// Report: the checkpoint is durably marked inconsistent.
    Marked,
    /// Report: every device is in `RUNNING`.
    AllRunning,
    /// Call, or at once where nobody is asked: let the destination run what it has loaded.
    CommitDue,
    /// Report: the destination runs the state, durably; or an administrator said so.
    Committed,
    /// Report: the destination will never run the state, durably; or an administrator said so.
    Refused,
    /// Report: every device was reset, or is quarantined. Nothing here carries the state any more.
    LetGo,
    /// Call: undo the save.
    Cancel,
    /// Report: the command at hand failed, whatever it was. The first one carries the error to be reported.
    Failed,
    /// Report: after a fall back, every device is in `RUNNING` with its own state.
    Recovered,
    /// Report: after a fall back, at least one device is not.
    Unrecoverable,
}

impl SaveEvent {
    /// All events.
    pub const ALL: [Self; 20] = [
        Self::Start,
        Self::CutoverDue,
        Self::Cutover,
        Self::AllQuiesced,
        Self::AllStopped,
        Self::AllDrained,
        Self::AllParked,
        Self::Sealed,
        Self::Resume,
        Self::HoldExpired,
        Self::Marked,
        Self::AllRunning,
        Self::CommitDue,
        Self::Committed,
        Self::Refused,
        Self::LetGo,
        Self::Cancel,
        Self::Failed,
        Self::Recovered,
        Self::Unrecoverable,
    ];
}

impl fmt::Display for SaveEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What the executor does next. It abandons the command before, if that is still at work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SaveCommand {
    /// Move every device to `PRE_COPY` and read its stream in rounds; arm the budget for pre-copying. With
    /// automatic cutover, report [`SaveEvent::CutoverDue`].
    EnterPreCopy,
    /// Wait for the caller's cutover, at most until the operation's deadline.
    AwaitCutover,
    /// Quiesce every device and report [`SaveEvent::AllQuiesced`]. Go on reading its stream if it has one.
    Quiesce,
    /// Move every device to `STOP_COPY` and report [`SaveEvent::AllStopped`].
    EnterStopCopy,
    /// Read every stream to its end and report [`SaveEvent::AllDrained`].
    Drain,
    /// Move every device to `STOP`, which closes the streams, capture its configuration space, and report
    /// [`SaveEvent::AllParked`].
    Park,
    /// Make lengths and digests final, durably, and report [`SaveEvent::Sealed`].
    Seal,
    /// Tell the caller that the devices are held, arm the deadline, and wait for Resume.
    AwaitResume,
    /// Mark the checkpoint inconsistent, durably, and report [`SaveEvent::Marked`].
    MarkInconsistent,
    /// Run every device again and report [`SaveEvent::AllRunning`].
    Resume,
    /// The destination has loaded all and waits. Report [`SaveEvent::CommitDue`] as soon as it may go on; arm
    /// the deadline where that is for somebody to say.
    AwaitCommit,
    /// Tell the destination to run, and ask until its answer is known, for as long as it takes: report
    /// [`SaveEvent::Committed`] or [`SaveEvent::Refused`] and nothing else. Silence is no answer. Can be given
    /// again.
    Commit,
    /// Reset every device, quarantine those that resist, and report [`SaveEvent::LetGo`]. Can be given again.
    LetGo,
    /// Read back the state of every device, follow [`crate::recover`] as a source for each, and report
    /// [`SaveEvent::Recovered`] or [`SaveEvent::Unrecoverable`]. Can be given again: it begins where the
    /// devices are.
    FallBack,
    /// The end: disarm the deadlines, close the data fds, give back the leases.
    Release,
    /// The end, as [`SaveCommand::Release`], after discarding what was written. What resists is left to the
    /// collector.
    Discard,
    /// The end, as [`SaveCommand::Release`], but keep the leases of the devices that did not come back and
    /// tell an administrator. Discard what was written only if it was never sealed.
    Quarantine,
}

impl SaveCommand {
    /// The states that the command moves the set through.
    ///
    /// Every device reaches one of them before any device leaves for the next; that is the barrier. In a fall
    /// back, a device that already runs is not quiesced again.
    pub const fn targets(self, plan: SavePlan) -> &'static [State] {
        match self {
            Self::EnterPreCopy => &[State::PreCopy],
            Self::Quiesce if plan.pre_copy => &[State::PreCopyP2p],
            Self::Quiesce => &[State::RunningP2p],
            Self::EnterStopCopy => &[State::StopCopy],
            Self::Park => &[State::Stop],
            Self::Resume | Self::FallBack if plan.barrier => &[State::RunningP2p, State::Running],
            Self::Resume | Self::FallBack => &[State::Running],
            Self::AwaitCutover
            | Self::Drain
            | Self::Seal
            | Self::AwaitResume
            | Self::MarkInconsistent
            | Self::AwaitCommit
            | Self::Commit
            | Self::LetGo
            | Self::Release
            | Self::Discard
            | Self::Quarantine => &[],
        }
    }
}

impl fmt::Display for SaveCommand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}
