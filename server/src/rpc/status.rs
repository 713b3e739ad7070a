//! The one place where a refusal becomes a gRPC status.
//!
//! `FAILED_PRECONDITION` means that trying again cannot help, `UNAVAILABLE` that it may, and then `RetryInfo` says when.
//! `INVALID_ARGUMENT` names the field. Every status carries an `ErrorInfo` with a stable reason, which is one of
//! [`ErrorReason`]: those are documented where the author of a client looks, and there are no others.

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{PreconditionViolation, StatusExt};
use vfio_checkpoint_device::chain;
use vfio_checkpoint_proto::domain::Invalid;
use vfio_checkpoint_proto::ids::{CheckpointName, DeviceName, OperationName, StoreName};
use vfio_checkpoint_proto::v1::ErrorReason;
use vfio_checkpoint_store::StoreError;

use crate::journal::JournalError;
use crate::migration::TicketError;
use crate::operation::Refused;
use crate::operation::admission::Blocker;
use crate::reason::error_info;

/// When it makes sense to try again what may work later.
const RETRY: Duration = Duration::from_secs(2);

/// Why a call is refused.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// A field of the request.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// A page token that this agent did not make.
    #[error("the page token is not one of this agent; start with the first page")]
    PageToken,
    /// No such device.
    #[error("there is no {0} on this agent; ListDevices shows those that are")]
    DeviceNotFound(DeviceName),
    /// No such operation.
    #[error("there is no {0}; it is of another agent, or finished and forgotten")]
    OperationNotFound(OperationName),
    /// No such store.
    #[error("there is no {0} on this agent; its configuration says which there are")]
    StoreNotFound(StoreName),
    /// No such checkpoint.
    #[error("there is no {0}; it was deleted, or never whole; ListCheckpoints shows those that are")]
    CheckpointNotFound(CheckpointName),
    /// A checkpoint of somebody else.
    #[error("{0} was made by another identity, and only that one or an admin may delete it")]
    NotYourCheckpoint(CheckpointName),
    /// What a store says of a checkpoint cannot be.
    #[error("{checkpoint} is damaged: {problem}; delete it")]
    CheckpointDamaged {
        /// Which one.
        checkpoint: CheckpointName,
        /// What is wrong with it.
        problem: String,
    },
    /// A store.
    #[error("{at}: {}", chain(.error))]
    Store {
        /// Which one, or which checkpoint of it.
        at: String,
        /// What it said.
        #[source]
        error: Box<StoreError>,
    },
    /// Something is in the way.
    #[error("{}", blockers(.0))]
    Blocked(Vec<Blocker>),
    /// An operation does not take that now.
    #[error("{operation}: {refused}")]
    Operation {
        /// Which one.
        operation: OperationName,
        /// Why not.
        #[source]
        refused: Refused,
    },
    /// An operation of somebody else.
    #[error("{0} was started by another identity, and only that one or an admin may do this")]
    NotYours(OperationName),
    /// An arrival that somebody else let in.
    #[error("another identity asked for the ticket of {0}, and only that one or an admin may say Ready")]
    NotYourAdmission(OperationName),
    /// A log of dirty pages of somebody else.
    #[error(
        "the dirty pages of {0} are tracked by another identity, or an operation of one has it; reading the log clears it"
    )]
    NotYourLog(DeviceName),
    /// The role in `StreamOpen` does not fit the operation.
    #[error("{operation} is a {kind}, so its caller has to be the {role} of the state")]
    StreamRole {
        /// Which one.
        operation: OperationName,
        /// What it is.
        kind: &'static str,
        /// What the caller has to be.
        role: &'static str,
    },
    /// The stream's first message did not come, or was another one.
    #[error("{0}")]
    StreamOpen(String),
    /// No version that both speak.
    #[error("{0}")]
    NoCommonVersion(String),
    /// The request id stands for another request.
    #[error("the request_id was used with another request before; make up a new one")]
    RequestIdReused,
    /// The source's operation stands for another arrival.
    #[error(
        "{0} of this source has prepared something else here before; a migration is an operation of its own"
    )]
    SourceOperationReused(OperationName),
    /// A request id whose reset was under way when the agent ended.
    #[error("the agent ended while it reset the device, so how that ended is not known; look at the device")]
    ResetUnknown,
    /// Nothing can be recorded, so nothing is done.
    #[error("nothing was done: {}", chain(.0))]
    Journal(#[from] JournalError),
    /// A device refused.
    #[error("{device}: {problem}")]
    Device {
        /// Which one.
        device: DeviceName,
        /// What it said.
        problem: String,
        /// Stable.
        reason: ErrorReason,
    },
    /// The caller lacks the role that the operation's kind takes.
    #[error("{operation} takes the role {role}")]
    RoleOfOperation {
        /// Which one.
        operation: OperationName,
        /// Which role.
        role: &'static str,
    },
    /// The work behind the call died.
    #[error(
        "the call died, which is a defect to report; what it had begun is taken up at the agent's next start"
    )]
    Died,
    /// The agent is ending.
    #[error("the agent is shutting down")]
    ShuttingDown,
    /// A ticket.
    #[error(transparent)]
    Ticket(#[from] TicketError),
}

impl Refusal {
    /// A field that is not as it should be.
    pub fn invalid(field: &str, problem: impl ToString) -> Self {
        Self::Invalid(Invalid::new(field, problem))
    }

    /// The stable reason.
    pub fn reason(&self) -> ErrorReason {
        classify(self).1
    }
}

fn blockers(blockers: &[Blocker]) -> String {
    let list: Vec<String> = blockers
        .iter()
        .map(|blocker| match &blocker.device {
            Some(device) => format!("{device}: {}", blocker.message),
            None => blocker.message.clone(),
        })
        .collect();
    format!("nothing was touched: {}", list.join("; "))
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        let (code, reason) = classify(&refusal);
        let mut details = error_info(reason, metadata(&refusal));
        match &refusal {
            Refusal::Invalid(invalid) => {
                details.add_bad_request_violation(invalid.field.clone(), invalid.problem.clone());
            }
            Refusal::PageToken => {
                details.add_bad_request_violation("page_token", message.clone());
            }
            Refusal::Blocked(blockers) => {
                details.set_precondition_failure(blockers.iter().map(violation).collect::<Vec<_>>());
            }
            Refusal::DeviceNotFound(_)
            | Refusal::OperationNotFound(_)
            | Refusal::StoreNotFound(_)
            | Refusal::CheckpointNotFound(_)
            | Refusal::NotYourCheckpoint(_)
            | Refusal::CheckpointDamaged { .. }
            | Refusal::Store { .. }
            | Refusal::Operation { .. }
            | Refusal::NotYours(_)
            | Refusal::NotYourAdmission(_)
            | Refusal::NotYourLog(_)
            | Refusal::StreamRole { .. }
            | Refusal::StreamOpen(_)
            | Refusal::NoCommonVersion(_)
            | Refusal::RequestIdReused
            | Refusal::SourceOperationReused(_)
            | Refusal::ResetUnknown
            | Refusal::Journal(_)
            | Refusal::Device { .. }
            | Refusal::RoleOfOperation { .. }
            | Refusal::Died
            | Refusal::ShuttingDown
            | Refusal::Ticket(_) => {}
        }
        if code == Code::Unavailable {
            details.set_retry_info(Some(RETRY));
        }
        Self::with_error_details(code, message, details)
    }
}

fn classify(refusal: &Refusal) -> (Code, ErrorReason) {
    match refusal {
        Refusal::Invalid(_) => (Code::InvalidArgument, ErrorReason::InvalidField),
        Refusal::PageToken => (Code::InvalidArgument, ErrorReason::InvalidPageToken),
        Refusal::DeviceNotFound(_) => (Code::NotFound, ErrorReason::DeviceNotFound),
        Refusal::OperationNotFound(_) => (Code::NotFound, ErrorReason::OperationNotFound),
        Refusal::Blocked(blockers) if blockers.iter().all(Blocker::is_passing) => {
            (Code::Unavailable, ErrorReason::Blocked)
        }
        Refusal::Blocked(_) => (Code::FailedPrecondition, ErrorReason::Blocked),
        Refusal::Operation { refused: Refused::NotReady, .. } => (Code::Unavailable, ErrorReason::NotReady),
        Refusal::Operation { refused: Refused::CallerGone, .. } => (Code::Cancelled, ErrorReason::CallerGone),
        Refusal::Operation { refused, .. } => (
            Code::FailedPrecondition,
            match refused {
                Refused::Over => ErrorReason::OperationOver,
                Refused::Undone => ErrorReason::OperationUndone,
                Refused::PastNoReturn { .. } => ErrorReason::PastNoReturn,
                Refused::NotManual => ErrorReason::NotManual,
                Refused::NoHold => ErrorReason::NoHold,
                Refused::NotHeld { .. } => ErrorReason::NotHeld,
                Refused::StreamTaken => ErrorReason::StreamTaken,
                Refused::OtherStream => ErrorReason::NoStreamToResume,
                Refused::NoStream => ErrorReason::NoStream,
                Refused::NotAMigration => ErrorReason::NotAMigration,
                Refused::NotAskedFor => ErrorReason::NotAskedFor,
                Refused::NotPrepared { .. } => ErrorReason::NotPrepared,
                Refused::NotReady => ErrorReason::NotReady,
                Refused::CallerGone => ErrorReason::CallerGone,
                Refused::StaleEpoch => ErrorReason::StaleEpoch,
                Refused::NotInDoubt { .. } => ErrorReason::NotInDoubt,
                Refused::Unresolvable(_) => ErrorReason::Unresolvable,
            },
        ),
        Refusal::StoreNotFound(_) => (Code::NotFound, ErrorReason::StoreNotFound),
        Refusal::CheckpointNotFound(_) => (Code::NotFound, ErrorReason::CheckpointNotFound),
        Refusal::NotYourCheckpoint(_) => (Code::PermissionDenied, ErrorReason::NotYourCheckpoint),
        Refusal::CheckpointDamaged { .. } => (Code::FailedPrecondition, ErrorReason::CheckpointDamaged),
        Refusal::Store { error, .. } => store(error),
        Refusal::NotYours(_) | Refusal::NotYourAdmission(_) => {
            (Code::PermissionDenied, ErrorReason::NotYourOperation)
        }
        Refusal::NotYourLog(_) => (Code::PermissionDenied, ErrorReason::NotYourDirtyLog),
        Refusal::StreamRole { .. } => (Code::FailedPrecondition, ErrorReason::StreamRole),
        Refusal::StreamOpen(_) => (Code::InvalidArgument, ErrorReason::StreamOpen),
        Refusal::NoCommonVersion(_) => (Code::FailedPrecondition, ErrorReason::NoCommonVersion),
        Refusal::RequestIdReused | Refusal::SourceOperationReused(_) => {
            (Code::AlreadyExists, ErrorReason::RequestIdReused)
        }
        Refusal::ResetUnknown => (Code::FailedPrecondition, ErrorReason::ResetUnknown),
        Refusal::Journal(_) => (Code::Unavailable, ErrorReason::JournalFailed),
        Refusal::Device { reason, .. } => (Code::FailedPrecondition, *reason),
        Refusal::RoleOfOperation { .. } => (Code::PermissionDenied, ErrorReason::RoleRequired),
        Refusal::Died | Refusal::Ticket(TicketError::Random) => (Code::Internal, ErrorReason::Defect),
        Refusal::ShuttingDown => (Code::Unavailable, ErrorReason::ShuttingDown),
        Refusal::Ticket(TicketError::Invalid) => (Code::FailedPrecondition, ErrorReason::TicketInvalid),
        Refusal::Ticket(TicketError::Mismatch { .. }) => {
            (Code::PermissionDenied, ErrorReason::TicketMismatch)
        }
        Refusal::Ticket(TicketError::Full | TicketError::Share { .. }) => {
            (Code::Unavailable, ErrorReason::TooManyTickets)
        }
    }
}

fn store(error: &StoreError) -> (Code, ErrorReason) {
    match error {
        StoreError::Damaged { .. } => (Code::FailedPrecondition, ErrorReason::CheckpointDamaged),
        StoreError::NotFound { .. } | StoreError::Revoked { .. } => {
            (Code::NotFound, ErrorReason::CheckpointNotFound)
        }
        StoreError::Unavailable { .. } | StoreError::DiskFull { .. } | StoreError::NoSpace { .. } => {
            (Code::Unavailable, ErrorReason::StoreUnavailable)
        }
        StoreError::Foreign { .. }
        | StoreError::Missing { .. }
        | StoreError::NotRegular { .. }
        | StoreError::TooLarge { .. }
        | StoreError::Invalid { .. }
        | StoreError::Location { .. }
        | StoreError::Folder { .. } => (Code::FailedPrecondition, ErrorReason::StoreUnusable),
        StoreError::Died => (Code::Internal, ErrorReason::Defect),
    }
}

fn metadata(refusal: &Refusal) -> HashMap<String, String> {
    let (key, value) = match refusal {
        Refusal::DeviceNotFound(device) | Refusal::NotYourLog(device) | Refusal::Device { device, .. } => {
            ("device", device.to_string())
        }
        Refusal::OperationNotFound(operation)
        | Refusal::NotYours(operation)
        | Refusal::NotYourAdmission(operation)
        | Refusal::Operation { operation, .. }
        | Refusal::RoleOfOperation { operation, .. }
        | Refusal::StreamRole { operation, .. } => ("operation", operation.to_string()),
        Refusal::StoreNotFound(store) => ("store", store.to_string()),
        Refusal::CheckpointNotFound(checkpoint)
        | Refusal::NotYourCheckpoint(checkpoint)
        | Refusal::CheckpointDamaged { checkpoint, .. } => ("checkpoint", checkpoint.to_string()),
        Refusal::Store { at, .. } => ("store", at.clone()),
        Refusal::Invalid(_)
        | Refusal::PageToken
        | Refusal::Blocked(_)
        | Refusal::StreamOpen(_)
        | Refusal::NoCommonVersion(_)
        | Refusal::RequestIdReused
        | Refusal::SourceOperationReused(_)
        | Refusal::ResetUnknown
        | Refusal::Journal(_)
        | Refusal::Died
        | Refusal::ShuttingDown
        | Refusal::Ticket(_) => return HashMap::new(),
    };
    HashMap::from([(key.to_owned(), value)])
}

fn violation(blocker: &Blocker) -> PreconditionViolation {
    let subject = blocker.device.as_ref().map(ToString::to_string).unwrap_or_default();
    PreconditionViolation::new(blocker.reason.as_str_name(), subject, blocker.message.clone())
}
