//! How an operation ended, in the terms of its record.

mod not_kept;

use std::sync::Arc;
use std::time::Duration;

use vfio_checkpoint_device::operation::{Cause, OperationError, RestoreReport, SaveReport};
use vfio_checkpoint_device::{Backend, Identity, chain};
use vfio_checkpoint_fsm::handover::ArrivalEnd;
use vfio_checkpoint_fsm::{Outcome, SaveState, State, Validity};
use vfio_checkpoint_proto::domain;
use vfio_checkpoint_proto::ids::{DeviceName, Epoch};
use vfio_checkpoint_proto::v1::FailureReason;
use vfio_checkpoint_store::StoreError;

pub(super) use not_kept::{Why, not_kept};

use super::entry::{Cancel, Entry};
use super::meter::per_second;
use super::record::{
    AfterRecord, Consistency, EndOutcome, EndRecord, EndResult, FailureRecord, JobRecord,
    OperationDeviceRecord, RecordedStep, VerdictRecord,
};
use crate::core::Core;
use crate::journal::{Change, DeviceRecord, Owed, PastRecord};
use crate::migration::NotTaken;
use crate::registry::opening::new_logical;
use crate::registry::{Lease, Slot, Standing};

/// How an operation ended, before it is on record.
#[derive(Debug)]
pub(super) struct End {
    result: EndResult,
    outcome: EndOutcome,
    failure: Option<FailureRecord>,
    consistency: Option<Consistency>,
    downtime: Option<Duration>,
    predicted_downtime: Option<Duration>,
    quarantined: Vec<DeviceName>,
    left_stopped: bool,
    /// What state moved at.
    rate_bytes_per_second: Option<u64>,
    /// The devices whose state is gone, where it is not that of all.
    lost: Option<Vec<DeviceName>>,
    /// The devices that were reset, and so run, where the others stay stopped.
    reset: Vec<DeviceName>,
    /// Whether its devices were there to the end.
    kept: bool,
    /// Whether they were let go of, because what was in them runs elsewhere, or may.
    let_go: bool,
}

impl End {
    fn new(result: EndResult, outcome: EndOutcome) -> Self {
        Self {
            result,
            outcome,
            failure: None,
            consistency: None,
            downtime: None,
            predicted_downtime: None,
            quarantined: Vec::new(),
            left_stopped: false,
            rate_bytes_per_second: None,
            lost: None,
            reset: Vec::new(),
            kept: true,
            let_go: false,
        }
    }

    /// How the devices of an arrival ended.
    fn of_arrival(&self) -> ArrivalEnd {
        if self.result == EndResult::Succeeded {
            ArrivalEnd::AllRunning
        } else if !self.quarantined.is_empty() {
            ArrivalEnd::Quarantined
        } else if self.kept {
            ArrivalEnd::AllReset
        } else {
            ArrivalEnd::NotKept
        }
    }

    /// What the end means for the other side.
    fn settle_handover(&mut self, entry: &Entry, lease: &Lease) {
        if let JobRecord::Arrive { .. } = entry.fixed.job {
            let verdict = entry.on_record().arrival(None).verdict(self.of_arrival());
            entry.hand_over(|handover| {
                handover.record.verdict = Some(verdict.into());
                handover.awaits_ready = false;
            });
        }
        entry.hand_over(|handover| handover.in_doubt = false);
        if self.let_go {
            // Whatever was not seen to be reset must not run again: also one that does not answer, that is not open, or that
            // is not configured any more. The holder may have it as it was, and a later adoption goes by its record.
            let reset = |slot: &Arc<Slot>| {
                let view = slot.view();
                view.standing == Standing::Ready && matches!(view.state, Some((State::Running, _)))
            };
            let names = entry.device_names();
            let stuck = names.filter(|name| slot_of(lease, name).is_none_or(|slot| !reset(slot)));
            self.quarantined = stuck.cloned().collect();
        }
    }

    /// What became of a device's record where the state that it had is let go of.
    fn after_hand_over(entry: &Entry, index: usize, record: DeviceRecord) -> DeviceRecord {
        let Some(device) = entry.fixed.devices.get(index) else { return record };
        let there = entry.view().handover.and_then(|known| known.record.epochs.get(index).copied());
        let past = PastRecord {
            logical: device.logical.clone(),
            epoch: there.unwrap_or(device.epoch),
            runs_nowhere: false,
            handed_over: true,
        };
        // One that was seen to be reset carries nothing of it.
        DeviceRecord { handed_over: record.quarantined, ..record }.with_past(past)
    }

    /// What runs again under this epoch is newer than what the destination may have run.
    fn epoch_after(entry: &Entry, index: usize, before: Epoch) -> Epoch {
        let Some(handover) = entry.view().handover else { return before };
        let may_have_run = handover.record.resolution.is_some_and(|decided| decided.resume_here);
        match handover.record.epochs.get(index) {
            Some(there) if may_have_run && matches!(entry.fixed.job, JobRecord::Migrate { .. }) => {
                Epoch(before.0.max(there.0.saturating_add(1)))
            }
            Some(_) | None => before,
        }
    }

    fn because(
        mut self,
        reason: FailureReason,
        message: impl Into<String>,
        device: Option<DeviceName>,
    ) -> Self {
        self.failure =
            Some(FailureRecord { reason: reason.as_reason().to_owned(), message: message.into(), device });
        self
    }

    /// The record, and all that goes to the journal with it.
    pub(super) fn settle(mut self, core: &Core, entry: &Entry, lease: &Lease) -> (EndRecord, Vec<Change>) {
        self.settle_handover(entry, lease);
        let view = entry.view();
        let checkpoint = entry.fixed.checkpoint.as_ref();
        let owed = checkpoint.and_then(|name| core.stores.debts().of(name));
        if let (Some(failure), Some(owed), JobRecord::Save { .. }) =
            (&mut self.failure, owed, entry.fixed.job)
        {
            // Who reads the store by another way than this agent finds it as it was.
            failure.message.push_str(match owed {
                Owed::Inconsistent => {
                    "; its store could not be told of that yet: this agent refuses it, and goes on trying"
                }
                Owed::Discard => {
                    "; its checkpoint could not be discarded in its store yet: this agent goes on trying"
                }
            });
        }
        let OutOfService { quarantined, hung, unavailable } =
            OutOfService::among(&entry.fixed.devices, lease, &self.quarantined);
        let now = core.environment.unix_now();
        // Not where devices do not run again: nobody knows for how long.
        let run_again =
            self.outcome == EndOutcome::Preserved && self.quarantined.is_empty() && !self.left_stopped;
        let stood_still =
            run_again.then(|| entry.stood_still(now, core.environment.executor.now())).flatten();
        let record = EndRecord {
            at: now,
            result: self.result,
            outcome: self.outcome,
            failure: self.failure,
            consistency: self.consistency,
            moved_bytes: view.devices.iter().map(|live| live.moved_bytes).collect(),
            pre_copy_bytes: view
                .devices
                .iter()
                .fold(0, |sum: u64, live| sum.saturating_add(live.pre_copy_bytes)),
            device_pre_copy_bytes: view.devices.iter().map(|live| live.pre_copy_bytes).collect(),
            downtime: self.downtime.or(stood_still),
            predicted_downtime: self.predicted_downtime.or(view.predicted_downtime),
            quarantined,
            hung,
            unavailable,
            left_stopped: self.left_stopped,
            revision: view.revision + 1,
        };
        let mut changes =
            vec![Change::Operation(Box::new(entry.record(RecordedStep::Ended(record.clone()))))];
        changes.extend(core.stores.debts().unrecorded(checkpoint));
        for (index, device) in entry.fixed.devices.iter().enumerate() {
            let name = &device.device;
            let is_quarantined = self.quarantined.contains(name);
            let before = match slot_of(lease, name).and_then(|slot| slot.view().record) {
                Some(before) => before,
                // It is not configured any more. Where it is again, this is known of it.
                None if is_quarantined => not_configured(device),
                None => continue,
            };
            let (logical, epoch) = match self.outcome {
                EndOutcome::Preserved => {
                    (before.logical.clone(), Self::epoch_after(entry, index, before.epoch))
                }
                EndOutcome::Replaced => (device.logical.clone(), device.epoch),
                EndOutcome::StateLost if self.lost.as_ref().is_some_and(|lost| !lost.contains(name)) => {
                    (before.logical.clone(), Self::epoch_after(entry, index, before.epoch))
                }
                // Nothing of what was here lives on, or lives on elsewhere: whatever runs now is somebody new.
                EndOutcome::StateLost | EndOutcome::Moved => (new_logical(&core.environment), Epoch(1)),
            };
            let record = DeviceRecord {
                logical,
                epoch,
                rate_bytes_per_second: self.rate_bytes_per_second.or(before.rate_bytes_per_second),
                // Also of one that hangs: after a restart of the agent it answers, and is where nobody knows.
                quarantined: before.quarantined || is_quarantined,
                left_stopped: self.left_stopped && !self.reset.contains(name),
                handed_over: before.handed_over,
                past: before.past.clone(),
            };
            let record = match self.outcome {
                EndOutcome::Replaced => core.back_to_life(record),
                EndOutcome::Moved | EndOutcome::StateLost if self.let_go => {
                    Self::after_hand_over(entry, index, record)
                }
                EndOutcome::Moved | EndOutcome::Preserved | EndOutcome::StateLost => record,
            };
            if record != before {
                changes.push(Change::Device(name.clone(), record));
            }
        }
        (record, changes)
    }
}

/// Devices of an operation that take no work at its end, each in the list that says why.
#[derive(Debug, Default)]
struct OutOfService {
    quarantined: Vec<DeviceName>,
    hung: Vec<DeviceName>,
    unavailable: Vec<DeviceName>,
}

impl OutOfService {
    /// `quarantined` are those that the device layer could not bring back, also because they do not answer: which of
    /// them hang their slots know, which were read back meanwhile.
    fn among(devices: &[OperationDeviceRecord], lease: &Lease, quarantined: &[DeviceName]) -> Self {
        let mut out = Self::default();
        for OperationDeviceRecord { device, .. } in devices {
            match slot_of(lease, device).map(|slot| slot.view().standing) {
                Some(Standing::Hung(_)) => out.hung.push(device.clone()),
                // One without a slot is not configured any more.
                Some(Standing::Unavailable(_) | Standing::NotMigratable(_)) | None => {
                    out.unavailable.push(device.clone());
                }
                Some(Standing::Ready | Standing::Quarantined) if quarantined.contains(device) => {
                    out.quarantined.push(device.clone());
                }
                Some(Standing::Ready | Standing::Quarantined) => {}
            }
        }
        out
    }
}

/// What the journal says of devices is what the registry says.
pub(super) fn take_over_records(core: &Core, changes: &[Change]) {
    for change in changes {
        match change {
            Change::Device(name, record) => {
                if let Some(slot) = core.registry.get(name) {
                    slot.set_record(record.clone());
                }
            }
            Change::Operation(_)
            | Change::ForgetOperation(_)
            | Change::Request(..)
            | Change::ForgetRequest(_)
            | Change::Debt(..)
            | Change::ForgetDebt(_) => {}
        }
    }
}

/// It was given up before anything was touched.
pub(super) fn never_begun(why: &Cancel) -> End {
    let (result, reason) = match why {
        Cancel::Requested { .. } => (EndResult::Cancelled, FailureReason::Cancelled),
        Cancel::NoStream { .. } => (EndResult::Failed, FailureReason::NoStream),
        Cancel::Abandoned { .. } => (EndResult::Failed, FailureReason::HandoverAbandoned),
        Cancel::ShuttingDown => (EndResult::Failed, FailureReason::ShuttingDown),
    };
    let message = format!("nothing was touched: {why}");
    End::new(result, EndOutcome::Preserved).because(reason, message, None)
}

/// The agent ended before a restore had begun.
pub(super) fn untouched() -> End {
    End::new(EndResult::Failed, EndOutcome::Preserved).because(
        FailureReason::AgentRestarted,
        "the agent ended before the restore had begun; nothing was touched",
        None,
    )
}

/// The store did not take a checkpoint in hand.
pub(super) fn not_stored(error: &StoreError) -> Box<End> {
    let reason = crate::transfer::reason(error).unwrap_or(FailureReason::StoreFailed);
    let message = format!("nothing was touched: {}", chain(error));
    Box::new(End::new(EndResult::Failed, EndOutcome::Preserved).because(reason, message, None))
}

/// What is to be saved cannot be told to a store.
pub(super) fn undescribed(problem: &str) -> Box<End> {
    let message = format!("nothing was touched: the store cannot be told what is saved: {problem}");
    Box::new(End::new(EndResult::Failed, EndOutcome::Preserved).because(FailureReason::Failed, message, None))
}

/// The destination of a migration did not take it.
pub(super) fn not_taken(error: &NotTaken) -> Box<End> {
    let message = format!("nothing was touched: {error}");
    let end = End::new(EndResult::Failed, EndOutcome::Preserved);
    Box::new(end.because(FailureReason::DestinationRefused, message, None))
}

/// How a migration ended.
pub(super) fn of_migration(entry: &Entry, lease: &Lease, moved: Result<SaveReport, OperationError>) -> End {
    match moved {
        Ok(report) => with_report(handed_over(entry), &report),
        Err(error) => failed(entry, lease, &error),
    }
}

/// A migration whose devices were let go of.
pub(super) fn handed_over(entry: &Entry) -> End {
    let handover = entry.view().handover.map(|handover| handover.record);
    let committed = handover.as_ref().is_some_and(|known| known.verdict == Some(VerdictRecord::Committed));
    let decided = handover.and_then(|known| known.resolution);
    let end = match decided {
        Some(decided) if !committed => End::new(EndResult::Failed, EndOutcome::StateLost).because(
            FailureReason::Resolved,
            format!(
                "the devices were let go of although the destination has not said that it runs them: an admin has \
                 decided: {decided}"
            ),
            None,
        ),
        Some(_) | None => End::new(EndResult::Succeeded, EndOutcome::Moved),
    };
    End { let_go: true, ..end }
}

/// A save was given what only a restore has, or the other way round.
pub(super) fn no_way() -> End {
    End::new(EndResult::Failed, EndOutcome::Preserved).because(
        FailureReason::Failed,
        "nothing was touched: the operation has the way of another kind, which is a defect to report",
        None,
    )
}

/// A device of the set is not open any more.
pub(super) fn not_open() -> End {
    End::new(EndResult::Failed, EndOutcome::Preserved).because(
        FailureReason::DeviceUnavailable,
        "nothing was touched: a device of the set is not open",
        None,
    )
}

/// How a save ended.
pub(super) fn of_save(entry: &Entry, lease: &Lease, saved: Result<SaveReport, OperationError>) -> End {
    match saved {
        Ok(report) => with_report(sealed_save(entry), &report),
        Err(OperationError::Inconsistent { report }) => {
            let end = inconsistent();
            match report {
                Some(report) => with_report(end, &report),
                None => end,
            }
        }
        Err(error) => failed(entry, lease, &error),
    }
}

/// A save that did all it should.
pub(super) fn sealed_save(entry: &Entry) -> End {
    let mut end = End::new(EndResult::Succeeded, EndOutcome::Preserved);
    end.consistency = Some(Consistency::Consistent);
    end.left_stopped = match entry.fixed.job {
        JobRecord::Save { after: AfterRecord::StayStopped, .. } => true,
        JobRecord::Save { after: AfterRecord::Resume | AfterRecord::Hold, .. }
        | JobRecord::Restore { .. }
        | JobRecord::Migrate { .. }
        | JobRecord::Arrive { .. } => false,
    };
    end
}

fn inconsistent() -> End {
    let mut end = End::new(EndResult::Failed, EndOutcome::Preserved).because(
        FailureReason::HoldExpired,
        "nobody said Resume before the hold ran out: the devices run on, and the checkpoint is INCONSISTENT, because \
         memory that was captured with it may have moved on",
        None,
    );
    end.consistency = Some(Consistency::Inconsistent);
    end
}

fn with_report(mut end: End, report: &SaveReport) -> End {
    end.downtime = Some(report.downtime);
    end.predicted_downtime = report.predicted_downtime;
    let bytes = report.bytes.iter().fold(0_u64, |sum, bytes| sum.saturating_add(*bytes));
    // Of the stop alone: pre-copy shares the device with its workload, and pauses.
    let stopped = bytes.saturating_sub(report.precopy_bytes);
    let rate = per_second(stopped, report.downtime);
    end.rate_bytes_per_second = (stopped >= MEASURABLE_BYTES && rate > 0).then_some(rate);
    end
}

/// Less than this says more about the round trips than about the rate.
const MEASURABLE_BYTES: u64 = 16 << 20;

/// How a restore ended.
pub(super) fn of_restore(
    entry: &Entry,
    lease: &Lease,
    restored: Result<RestoreReport, OperationError>,
) -> End {
    match restored {
        Ok(_) => End::new(EndResult::Succeeded, EndOutcome::Replaced),
        Err(error) => failed(entry, lease, &error),
    }
}

/// How an operation ended that did not do what was asked for.
pub(super) fn failed(entry: &Entry, lease: &Lease, error: &OperationError) -> End {
    let cancelled =
        error.is_cancelled() && matches!(entry.signals.cancel_reason(), Some(Cancel::Requested { .. }));
    let result = if cancelled { EndResult::Cancelled } else { EndResult::Failed };
    match error {
        OperationError::Refused(refusal) => {
            End::new(result, EndOutcome::Preserved).because(FailureReason::Blocked, chain(refusal), None)
        }
        OperationError::NotReady { device, .. } => {
            let device = name_of(lease, device);
            End::new(result, EndOutcome::Preserved).because(
                FailureReason::DeviceNotReady,
                chain(error),
                device,
            )
        }
        OperationError::Failed { cause, outcome, quarantined, checkpoint } => {
            let outcome = match outcome {
                Outcome::Preserved => EndOutcome::Preserved,
                Outcome::StateLost => EndOutcome::StateLost,
            };
            let (reason, device) = reason(lease, entry, cause);
            let mut end = End::new(result, outcome).because(reason, chain(error), device);
            end.quarantined = quarantined.iter().filter_map(|device| name_of(lease, device)).collect();
            end.consistency = checkpoint.map(|validity| match validity {
                Validity::Consistent => Consistency::Consistent,
                Validity::Inconsistent => Consistency::Inconsistent,
            });
            end
        }
        OperationError::Inconsistent { .. } => inconsistent(),
    }
}

fn reason(lease: &Lease, entry: &Entry, cause: &Cause) -> (FailureReason, Option<DeviceName>) {
    match cause {
        Cause::Device { device, .. } => (FailureReason::DeviceFailed, name_of(lease, device)),
        Cause::Cancelled(error) => match (crate::transfer::reason(&**error), entry.signals.cancel_reason()) {
            (Some(reason), _) => (reason, None),
            (None, Some(Cancel::Abandoned { .. })) => (FailureReason::HandoverAbandoned, None),
            (None, Some(Cancel::ShuttingDown)) => (FailureReason::ShuttingDown, None),
            (None, Some(Cancel::Requested { .. } | Cancel::NoStream { .. }) | None) => {
                (FailureReason::Cancelled, None)
            }
        },
        Cause::Unrecorded(_) => (FailureReason::JournalFailed, None),
        Cause::NoCutover { .. } => (FailureReason::CutoverTimeout, None),
        Cause::Downtime { .. } => (FailureReason::NoConvergence, None),
        Cause::HoldExpired { .. } if matches!(entry.fixed.job, JobRecord::Arrive { .. }) => {
            (FailureReason::CommitTimeout, None)
        }
        Cause::HoldExpired { .. } => (FailureReason::HoldExpired, None),
        Cause::StopLimit { .. } => (FailureReason::DowntimeLimit, None),
        Cause::NoCommit { .. } => (FailureReason::CommitTimeout, None),
        Cause::NotTaken(_) => {
            let decided = entry.view().handover.and_then(|handover| handover.record.resolution);
            let reason =
                if decided.is_some() { FailureReason::Resolved } else { FailureReason::HandoverRefused };
            (reason, None)
        }
        Cause::NotReady { .. } => (FailureReason::OwnerNotReady, None),
        Cause::Interrupted => (FailureReason::AgentRestarted, None),
        Cause::Other(error) => (crate::transfer::reason(&**error).unwrap_or(FailureReason::Failed), None),
    }
}

fn slot_of<'a>(lease: &'a Lease, name: &DeviceName) -> Option<&'a Arc<Slot>> {
    lease.slots().iter().find(|slot| slot.name() == name)
}

/// What is known of a device of an operation that has no slot.
fn not_configured(device: &OperationDeviceRecord) -> DeviceRecord {
    DeviceRecord {
        logical: device.logical.clone(),
        epoch: device.epoch,
        rate_bytes_per_second: None,
        quarantined: true,
        left_stopped: false,
        handed_over: false,
        past: Vec::new(),
    }
}

fn name_of(lease: &Lease, device: &Identity) -> Option<DeviceName> {
    let slots = lease.slots().iter();
    slots
        .filter(|slot| slot.lane().is_some_and(|lane| lane.identity() == device))
        .map(|slot| slot.name().clone())
        .next()
}

/// The device layer took a save up and ended it in a way that no success has: a defect.
pub(super) fn unexpected(state: SaveState) -> End {
    let message = format!("the save that was taken up ended as {state}, which is a defect to report");
    End::new(EndResult::Failed, EndOutcome::Preserved).because(FailureReason::Failed, message, None)
}

pub(super) fn backend_to_wire(backend: Backend) -> domain::Backend {
    match backend {
        Backend::Kernel => domain::Backend::Kernel,
        Backend::Sim => domain::Backend::Sim,
        Backend::VfioUser => domain::Backend::VfioUser,
    }
}
