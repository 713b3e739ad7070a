//! The map from refusals to statuses, and that it says every reason that a client's author reads of.
//!
//! Most reasons are provoked at a served agent by the tests of the workspace. `DEFECT` cannot be: it takes work that
//! panics, and there is none on purpose. What stands for it there is this map, and `to_its_end`.

use vfio_checkpoint_fsm::handover::Unresolvable;
use vfio_checkpoint_store::StoreError;

use super::*;
use crate::core::Tasks;
use crate::operation::Phase;

fn device() -> DeviceName {
    "devices/nic0".parse().unwrap()
}

fn operation() -> OperationName {
    "operations/a".parse().unwrap()
}

fn refused(refused: Refused) -> Refusal {
    Refusal::Operation { operation: operation(), refused }
}

fn checkpoint() -> CheckpointName {
    "stores/cold/checkpoints/019aa7b4c10-5c0ffee15c0ffee1".parse().unwrap()
}

fn of_device(reason: ErrorReason) -> Refusal {
    Refusal::Device { device: device(), problem: "it will not".to_owned(), reason }
}

/// A refusal with this reason, and the code that reason.proto promises for it; none where no handler makes it.
#[allow(clippy::too_many_lines, reason = "a line for each reason, and nothing else")]
fn sample(reason: ErrorReason) -> Option<(Refusal, Code)> {
    let refusal = match reason {
        ErrorReason::Unspecified
        // Of the gate.
        | ErrorReason::UnknownMethod
        | ErrorReason::CertificateRequired
        | ErrorReason::CertificateEnded
        // Of the layer for requests that cannot be read.
        | ErrorReason::RequestTooLong
        | ErrorReason::RequestUnreadable
        | ErrorReason::RequestEncoding => None,
        ErrorReason::InvalidField => Some(Refusal::invalid("name", "it is empty")),
        ErrorReason::InvalidPageToken => Some(Refusal::PageToken),
        ErrorReason::DeviceNotFound => Some(Refusal::DeviceNotFound(device())),
        ErrorReason::OperationNotFound => Some(Refusal::OperationNotFound(operation())),
        ErrorReason::Blocked => {
            use vfio_checkpoint_proto::v1::BlockerReason;
            Some(Refusal::Blocked(vec![Blocker::device(BlockerReason::NotRunning, &device(), "it is stopped")]))
        }
        ErrorReason::OperationOver => Some(refused(Refused::Over)),
        ErrorReason::OperationUndone => Some(refused(Refused::Undone)),
        ErrorReason::PastNoReturn => Some(refused(Refused::PastNoReturn { phase: Phase::Resuming })),
        ErrorReason::NotManual => Some(refused(Refused::NotManual)),
        ErrorReason::NoHold => Some(refused(Refused::NoHold)),
        ErrorReason::NotHeld => Some(refused(Refused::NotHeld { phase: Phase::Loading })),
        ErrorReason::StreamTaken => Some(refused(Refused::StreamTaken)),
        ErrorReason::NoStreamToResume => Some(refused(Refused::OtherStream)),
        ErrorReason::NoStream => Some(refused(Refused::NoStream)),
        ErrorReason::NotAMigration => Some(refused(Refused::NotAMigration)),
        ErrorReason::NotAskedFor => Some(refused(Refused::NotAskedFor)),
        ErrorReason::NotPrepared => Some(refused(Refused::NotPrepared { phase: Phase::StopCopy })),
        ErrorReason::NotReady => Some(refused(Refused::NotReady)),
        ErrorReason::CallerGone => Some(refused(Refused::CallerGone)),
        ErrorReason::StaleEpoch => Some(refused(Refused::StaleEpoch)),
        ErrorReason::NotInDoubt => Some(refused(Refused::NotInDoubt { phase: Phase::Prepared })),
        ErrorReason::Unresolvable => Some(refused(Refused::Unresolvable(Unresolvable::MayRunThere))),
        ErrorReason::TicketInvalid => Some(TicketError::Invalid.into()),
        ErrorReason::TicketMismatch => {
            let (wanted, found) = ("this one".to_owned(), "that one".to_owned());
            Some(TicketError::Mismatch { wanted, found }.into())
        }
        ErrorReason::TooManyTickets => Some(TicketError::Full.into()),
        ErrorReason::StoreNotFound => Some(Refusal::StoreNotFound(StoreName::from_id("cold").unwrap())),
        ErrorReason::CheckpointNotFound => Some(Refusal::CheckpointNotFound(checkpoint())),
        ErrorReason::NotYourCheckpoint => Some(Refusal::NotYourCheckpoint(checkpoint())),
        ErrorReason::CheckpointDamaged => {
            let problem = "its manifest is of another".to_owned();
            Some(Refusal::CheckpointDamaged { checkpoint: checkpoint(), problem })
        }
        ErrorReason::StoreUnavailable => {
            let error = StoreError::NoSpace { needed_bytes: 2, free_bytes: 1 };
            Some(Refusal::Store { at: "stores/cold".to_owned(), error: Box::new(error) })
        }
        ErrorReason::StoreUnusable => {
            let error = StoreError::Foreign { name: "/photos".to_owned(), problem: "it holds photos".to_owned() };
            Some(Refusal::Store { at: "stores/cold".to_owned(), error: Box::new(error) })
        }
        ErrorReason::StreamRole => {
            Some(Refusal::StreamRole { operation: operation(), kind: "save", role: "TAKER" })
        }
        ErrorReason::StreamOpen => Some(Refusal::StreamOpen("no StreamOpen came".to_owned())),
        ErrorReason::NoCommonVersion => Some(Refusal::NoCommonVersion("1 and 98".to_owned())),
        ErrorReason::RequestIdReused => Some(Refusal::RequestIdReused),
        ErrorReason::ResetUnknown => Some(Refusal::ResetUnknown),
        ErrorReason::OutOfService | ErrorReason::ResetFailed | ErrorReason::DirtyTracking => Some(of_device(reason)),
        ErrorReason::JournalFailed => Some(Refusal::Journal(JournalError::Died)),
        ErrorReason::ShuttingDown => Some(Refusal::ShuttingDown),
        ErrorReason::Defect => Some(Refusal::Died),
        ErrorReason::RoleRequired => {
            Some(Refusal::RoleOfOperation { operation: operation(), role: "saver" })
        }
        ErrorReason::NotYourOperation => Some(Refusal::NotYours(operation())),
        ErrorReason::NotYourDirtyLog => Some(Refusal::NotYourLog(device())),
    };
    let code = match reason {
        ErrorReason::InvalidField
        | ErrorReason::InvalidPageToken
        | ErrorReason::StreamOpen
        | ErrorReason::RequestUnreadable => Code::InvalidArgument,
        ErrorReason::DeviceNotFound
        | ErrorReason::OperationNotFound
        | ErrorReason::StoreNotFound
        | ErrorReason::CheckpointNotFound => Code::NotFound,
        ErrorReason::Blocked
        | ErrorReason::OperationOver
        | ErrorReason::OperationUndone
        | ErrorReason::PastNoReturn
        | ErrorReason::NotManual
        | ErrorReason::NoHold
        | ErrorReason::NotHeld
        | ErrorReason::StreamTaken
        | ErrorReason::NoStreamToResume
        | ErrorReason::NoStream
        | ErrorReason::NotAMigration
        | ErrorReason::NotAskedFor
        | ErrorReason::NotPrepared
        | ErrorReason::StaleEpoch
        | ErrorReason::NotInDoubt
        | ErrorReason::Unresolvable
        | ErrorReason::TicketInvalid
        | ErrorReason::CheckpointDamaged
        | ErrorReason::StoreUnusable
        | ErrorReason::StreamRole
        | ErrorReason::NoCommonVersion
        | ErrorReason::ResetUnknown
        | ErrorReason::OutOfService
        | ErrorReason::ResetFailed
        | ErrorReason::DirtyTracking => Code::FailedPrecondition,
        ErrorReason::RequestIdReused => Code::AlreadyExists,
        ErrorReason::CallerGone => Code::Cancelled,
        ErrorReason::JournalFailed
        | ErrorReason::ShuttingDown
        | ErrorReason::StoreUnavailable
        | ErrorReason::NotReady
        | ErrorReason::TooManyTickets => Code::Unavailable,
        ErrorReason::Unspecified | ErrorReason::Defect => Code::Internal,
        ErrorReason::RoleRequired
        | ErrorReason::NotYourOperation
        | ErrorReason::NotYourDirtyLog
        | ErrorReason::NotYourCheckpoint
        | ErrorReason::TicketMismatch
        | ErrorReason::UnknownMethod => Code::PermissionDenied,
        ErrorReason::CertificateRequired | ErrorReason::CertificateEnded => Code::Unauthenticated,
        ErrorReason::RequestTooLong => Code::OutOfRange,
        ErrorReason::RequestEncoding => Code::Unimplemented,
    };
    Some((refusal?, code))
}

#[test]
fn every_refusal_has_its_reason_and_its_code_and_says_when_to_try_again() {
    let mut seen = 0;
    for reason in ErrorReason::all() {
        let Some((refusal, code)) = sample(reason) else { continue };
        seen += 1;
        let sentence = refusal.to_string();
        let status = Status::from(refusal);
        assert_eq!((status.code(), status.message()), (code, sentence.as_str()), "{reason:?}");
        let details = status.get_error_details();
        let info = details.error_info().expect("every status has one");
        assert_eq!((info.reason.as_str(), info.domain.as_str()), (reason.as_reason(), "vfio.checkpoint.v1"));
        let wait = details.retry_info().and_then(|info| info.retry_delay);
        assert_eq!(wait, (code == Code::Unavailable).then_some(RETRY), "{reason:?}");
        assert_eq!(details.bad_request().is_some(), sentence_names_a_field(reason), "{reason:?}");
        assert_eq!(details.precondition_failure().is_some(), reason == ErrorReason::Blocked, "{reason:?}");
    }
    assert_eq!(seen, ErrorReason::all().count() - 6, "of the gate and of the layer for unread requests");
}

fn sentence_names_a_field(reason: ErrorReason) -> bool {
    matches!(reason, ErrorReason::InvalidField | ErrorReason::InvalidPageToken)
}

#[test]
fn what_may_pass_by_itself_is_worth_another_try_only_where_all_of_it_may() {
    use vfio_checkpoint_proto::v1::BlockerReason;
    let blocker = |reason| Blocker::device(reason, &device(), "so it is");
    let code = |blockers| Status::from(Refusal::Blocked(blockers)).code();
    assert_eq!(code(vec![blocker(BlockerReason::Leased)]), Code::Unavailable);
    let both = vec![blocker(BlockerReason::Leased), blocker(BlockerReason::NotRunning)];
    assert_eq!(code(both), Code::FailedPrecondition);
}

#[tokio::test]
async fn work_that_panics_is_told_as_a_defect_and_ends_nothing_else() {
    let tasks = Tasks::default();
    let died = super::super::to_its_end::<()>(&tasks, async { panic!("on purpose") }).await.unwrap_err();
    assert_eq!(died.reason(), ErrorReason::Defect);
    let lives = super::super::to_its_end(&tasks, async { Ok(7) }).await.unwrap();
    assert_eq!(lives, 7);
}
