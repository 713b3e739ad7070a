//! How an operation ended, in the terms of its record. What of that goes to the journal is in `settle`.

mod not_kept;
mod settle;

use std::time::Duration;

use vfio_checkpoint_device::operation::{Cause, OperationError, RestoreReport, SaveReport};
use vfio_checkpoint_device::{Backend, Identity, chain};
use vfio_checkpoint_fsm::{Outcome, SaveState, Validity};
use vfio_checkpoint_proto::domain;
use vfio_checkpoint_proto::ids::DeviceName;
use vfio_checkpoint_proto::v1::FailureReason;
use vfio_checkpoint_store::StoreError;

pub(super) use not_kept::{Why, not_kept};
pub(super) use settle::{standing_still, take_over_records};

use super::entry::{Cancel, Entry};
use super::meter::per_second;
use super::record::{
    AfterRecord, Consistency, EndOutcome, EndResult, FailureRecord, JobRecord, VerdictRecord,
};
use crate::migration::NotTaken;
use crate::registry::Lease;

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
    /// Devices that were seen to be reset: they run, also where the others stay stopped, and carry nothing of what they had.
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

    /// The same, where what the operation had is gone from every device, also from one that could not be brought back.
    pub(super) fn of_all(mut self) -> Self {
        self.lost = None;
        self
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
        OperationError::Failed { cause, outcome, quarantined, reset, checkpoint } => {
            let outcome = match outcome {
                Outcome::Preserved => EndOutcome::Preserved,
                Outcome::StateLost => EndOutcome::StateLost,
            };
            let (reason, device) = reason(lease, entry, cause);
            let mut end = End::new(result, outcome).because(reason, words(entry, error), device);
            end.quarantined = quarantined.iter().filter_map(|device| name_of(lease, device)).collect();
            end.reset = reset.iter().filter_map(|device| name_of(lease, device)).collect();
            end.consistency = checkpoint.map(|validity| match validity {
                Validity::Consistent => Consistency::Consistent,
                Validity::Inconsistent => Consistency::Inconsistent,
            });
            end
        }
        OperationError::Inconsistent { .. } => inconsistent(),
    }
}

/// Why an operation failed, for people. What a restore waits for is Resume, and nobody says that to an arrival.
pub(super) fn words(entry: &Entry, error: &OperationError) -> String {
    let arrives = matches!(entry.fixed.job, JobRecord::Arrive { .. });
    let OperationError::Failed { cause: Cause::HoldExpired { limit }, .. } = error else {
        return chain(error);
    };
    match (arrives, entry.owes_ready()) {
        (false, _) => chain(error),
        (true, true) => {
            error.in_words(format_args!("whoever uses the devices did not say Ready within {limit:?}"))
        }
        (true, false) => error.in_words(format_args!("the source did not say Commit within {limit:?}")),
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
        Cause::HoldExpired { .. } if entry.owes_ready() => (FailureReason::OwnerNotReady, None),
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
