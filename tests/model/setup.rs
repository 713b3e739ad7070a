//! What one check of the model allows to go wrong, and which decision it replaces by a wrong one.
//!
//! ```text
//!   Setup = devices and their capabilities + AUTO or MANUAL + how many attempts + Budget + Plant
//! ```
//! Losing, doubling, delaying and reordering messages has no budget: every message may at any time be heard, again or
//! never. What has one is what happens to an agent or to a device.
//!
//! # Invariants
//! A setup without a plant uses the decisions of the `fsm` crate and no other.

use vfio_checkpoint_fsm::{AfterLoad, AfterSave, Capabilities, Cutover, RestorePlan, SavePlan, SaveRequest};

/// How many of each may happen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Budget {
    /// Crashes of the source's agent.
    pub(crate) source_crashes: u8,
    /// Crashes of the destination's agent.
    pub(crate) destination_crashes: u8,
    /// SETs and resets of the destination that fail.
    pub(crate) destination_sets: u8,
    /// SETs and resets of the source that fail.
    pub(crate) source_sets: u8,
    /// Writes to either journal that fail, and may be durable all the same.
    pub(crate) writes: u8,
    /// Streams of state that arrive damaged.
    pub(crate) damaged: u8,
}

/// Who says when the destination may run the devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Commit {
    Auto,
    Manual,
}

/// The epoch of a second attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Second {
    None,
    SameEpoch,
    HigherEpoch,
}

/// One check of the model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) name: &'static str,
    pub(crate) devices: usize,
    pub(crate) capabilities: Capabilities,
    pub(crate) pre_copy: bool,
    pub(crate) commit: Commit,
    pub(crate) second: Second,
    pub(crate) budget: Budget,
    /// The caller cancels, and either agent may be shut down.
    pub(crate) cancels: bool,
    /// An administrator decides, and can fence the destination.
    pub(crate) admin: bool,
    /// The destination's agent may stay away for good after a crash.
    pub(crate) gone: bool,
    pub(crate) plant: Option<Plant>,
}

/// A wrong decision in place of a right one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Plant {
    /// The source takes the end of its own stream for Prepared.
    CommitsBeforePrepared,
    /// That, and the destination runs on a Commit while it is loading.
    RunsUnprepared,
    /// The source resumes once its deadline has passed without an answer.
    ResumesOnSilence,
    /// The source takes Resolve without evidence and without a statement.
    UnguardedForce,
    /// The destination has forgotten its refusal, and takes the Commit afresh.
    ForgetsRefusal,
    /// A destination that knows nothing says Refused.
    RefusesFromNothing,
    /// The source takes a device that runs after a reset for one with its state.
    ResetIsPreserved,
    /// The destination puts COMMITTING on record after the SETs.
    RecordsAfterSet,
    /// The destination reports Committed as soon as one device runs.
    CommitsPart,
    /// The destination's deadline still counts after Commit.
    RefusesAfterCommitting,
    /// Neither hand-over nor epoch of a message are looked at.
    IdentityIgnored,
    /// The epoch of a message is looked at, the hand-over is not.
    HandoverIgnored,
    /// The source lets go once Commit was sent.
    LetsGoOnSent,
    /// A write that failed is taken for one that was not made.
    FailedWriteNotMade,
    /// The same, but where a device of the source runs the destination is told Abandon in place of Commit.
    JudgesByDevices,
    /// Where a write fails and that moves nothing, the command goes on without it.
    GoesOnUnrecorded,
    /// A ticket opens the destination again once its arrival was forgotten.
    TicketTwice,
    /// A ticket opens the destination although the logical device was there under a later epoch.
    OldTicket,
    /// The source resumes by itself where the destination has lost the state.
    LostIsRefused,
    /// Devices that were not kept are opened anew before the verdict is on record, and count as kept after that.
    OpensBeforeVerdict,
    /// The destination arms no deadline when it takes a prepared arrival up.
    NoDeadlineAfterCrash,
    /// The source does not ask again after a crash.
    AsksOnce,
    /// The source says Abandon of what an administrator has let go of.
    CallsOffWhatIsLetGo,
}

impl Plant {
    pub(crate) const ALL: [Self; 23] = [
        Self::CommitsBeforePrepared,
        Self::RunsUnprepared,
        Self::ResumesOnSilence,
        Self::UnguardedForce,
        Self::ForgetsRefusal,
        Self::RefusesFromNothing,
        Self::ResetIsPreserved,
        Self::RecordsAfterSet,
        Self::CommitsPart,
        Self::RefusesAfterCommitting,
        Self::IdentityIgnored,
        Self::HandoverIgnored,
        Self::LetsGoOnSent,
        Self::FailedWriteNotMade,
        Self::JudgesByDevices,
        Self::GoesOnUnrecorded,
        Self::TicketTwice,
        Self::OldTicket,
        Self::LostIsRefused,
        Self::OpensBeforeVerdict,
        Self::NoDeadlineAfterCrash,
        Self::AsksOnce,
        Self::CallsOffWhatIsLetGo,
    ];
}

impl Setup {
    pub(crate) const fn new(name: &'static str, devices: usize, p2p: bool, budget: Budget) -> Self {
        Self {
            name,
            devices,
            capabilities: Capabilities { p2p, pre_copy: true },
            pre_copy: false,
            commit: Commit::Auto,
            second: Second::None,
            budget,
            cancels: false,
            admin: false,
            gone: false,
            plant: None,
        }
    }

    pub(crate) fn planted(self, plant: Plant) -> bool {
        self.plant == Some(plant)
    }

    fn capabilities(&self) -> Vec<Capabilities> {
        vec![self.capabilities; self.devices]
    }

    pub(crate) fn save(&self) -> SavePlan {
        let request =
            SaveRequest { pre_copy: self.pre_copy, cutover: Cutover::Auto, after: AfterSave::HandOver };
        SavePlan::for_devices(&self.capabilities(), request).expect("a plan")
    }

    pub(crate) fn restore(&self) -> RestorePlan {
        RestorePlan::for_devices(&self.capabilities(), AfterLoad::Hold).expect("a plan")
    }

    pub(crate) fn epoch(&self, attempt: u8) -> u8 {
        match self.second {
            Second::None | Second::SameEpoch => 1,
            Second::HigherEpoch => 1 + attempt,
        }
    }
}
