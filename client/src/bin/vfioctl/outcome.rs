//! How a command ends: its exit code, and what is said of an operation that has ended.

use vfio_checkpoint_client::call::printable;
use vfio_checkpoint_proto::v1::{
    CheckpointConsistency, DeviceStanding, Operation, OperationResult, StateOutcome,
};

pub(crate) use crate::failure::Failure;

/// What became of the devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Done,
    /// Failed, and the devices keep their state.
    Failed,
    /// The command line is wrong.
    Usage,
    /// Refused before anything was touched.
    Refused,
    /// State is lost, or a device needs somebody.
    NeedsSomebody,
    /// The agent cannot be reached, or does not let this caller in.
    Unreachable,
    /// The time to wait is over.
    GoesOn,
    /// Interrupted.
    Interrupted,
}

impl Exit {
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Refused => 3,
            Self::NeedsSomebody => 4,
            Self::Unreachable => 5,
            Self::GoesOn => 6,
            Self::Interrupted => 130,
        }
    }

    /// Why, where nothing is known that says it better.
    pub(crate) fn reason(self) -> &'static str {
        match self {
            Self::Done => "DONE",
            Self::Failed => "FAILED",
            Self::Usage => "USAGE",
            Self::Refused => "REFUSED",
            Self::NeedsSomebody => "NEEDS_SOMEBODY",
            Self::Unreachable => "UNREACHABLE",
            Self::GoesOn => "GOES_ON",
            Self::Interrupted => "INTERRUPTED",
        }
    }
}

/// How an operation that is done ended, as an exit code and, where it did not succeed, in words.
pub(crate) fn judge(operation: &Operation) -> (Exit, Option<String>) {
    let mut said = Vec::new();
    if let Some(failure) = &operation.failure {
        let about = if failure.device.is_empty() {
            String::new()
        } else {
            format!(" ({})", printable(&failure.device))
        };
        said.push(format!("{}{about}: {}", printable(&failure.reason), printable(&failure.message)));
    }
    let mut needs_somebody = false;
    for device in &operation.devices {
        let (what, advice) = match device.standing() {
            DeviceStanding::Quarantined => (
                "is quarantined",
                "reset it with `vfioctl devices reset` once it is clear what may become of its state",
            ),
            DeviceStanding::Hung => {
                ("does not answer", "restart the agent, or the node if that does not help")
            }
            DeviceStanding::Unspecified | DeviceStanding::Ready | DeviceStanding::Unavailable => continue,
        };
        needs_somebody = true;
        said.push(format!("{} {what}; {advice}", printable(&device.device)));
    }
    let is_lost = match operation.outcome() {
        StateOutcome::StateLost => true,
        StateOutcome::Unspecified
        | StateOutcome::Preserved
        | StateOutcome::Replaced
        | StateOutcome::Moved => false,
    };
    let fate = match operation.outcome() {
        StateOutcome::StateLost => {
            "at least one device has lost its state; start its workload anew or restore it"
        }
        StateOutcome::Preserved => "the devices keep their state",
        StateOutcome::Replaced => "the devices carry the restored state",
        StateOutcome::Moved => "the devices of the destination carry their state on",
        StateOutcome::Unspecified => "what became of the devices is not said",
    };
    let is_inconsistent = operation.consistency() == CheckpointConsistency::Inconsistent;
    let verb = match operation.result() {
        OperationResult::Succeeded if is_inconsistent => {
            said.insert(
                0,
                "the hold ran out before Resume, so the checkpoint is marked INCONSISTENT".to_owned(),
            );
            "has ended"
        }
        OperationResult::Succeeded if needs_somebody || is_lost => "has succeeded",
        OperationResult::Succeeded => return (Exit::Done, None),
        OperationResult::Failed => "has failed",
        OperationResult::Cancelled => "was cancelled",
        OperationResult::Unspecified => "has no result yet",
    };
    let exit = if is_lost || needs_somebody { Exit::NeedsSomebody } else { Exit::Failed };
    let mut text = format!("{} {verb}; {fate}", printable(&operation.name));
    for line in said {
        text.push_str("\n  ");
        text.push_str(&line);
    }
    (exit, Some(text))
}

#[cfg(test)]
mod tests {
    use vfio_checkpoint_proto::v1::{OperationDevice, OperationFailure};

    use super::*;

    fn operation(result: OperationResult, outcome: StateOutcome) -> Operation {
        Operation {
            name: "operations/1".to_owned(),
            done: true,
            result: result.into(),
            outcome: outcome.into(),
            ..Operation::default()
        }
    }

    #[test]
    fn the_exit_code_says_what_became_of_the_devices() {
        let done = operation(OperationResult::Succeeded, StateOutcome::Preserved);
        assert_eq!(judge(&done), (Exit::Done, None));
        let replaced = operation(OperationResult::Succeeded, StateOutcome::Replaced);
        assert_eq!(judge(&replaced).0, Exit::Done);
        assert_eq!(judge(&operation(OperationResult::Failed, StateOutcome::Preserved)).0, Exit::Failed);
        assert_eq!(judge(&operation(OperationResult::Cancelled, StateOutcome::Preserved)).0, Exit::Failed);
        assert_eq!(
            judge(&operation(OperationResult::Failed, StateOutcome::StateLost)).0,
            Exit::NeedsSomebody
        );
        assert_eq!(
            judge(&operation(OperationResult::Cancelled, StateOutcome::StateLost)).0,
            Exit::NeedsSomebody
        );
        let mut stale = done.clone();
        stale.consistency = CheckpointConsistency::Inconsistent.into();
        assert_eq!(judge(&stale).0, Exit::Failed);
        for standing in [DeviceStanding::Quarantined, DeviceStanding::Hung] {
            let mut stuck = operation(OperationResult::Failed, StateOutcome::Preserved);
            stuck.devices = vec![OperationDevice { standing: standing.into(), ..OperationDevice::default() }];
            assert_eq!(judge(&stuck).0, Exit::NeedsSomebody, "{standing:?}");
        }
    }

    #[test]
    fn what_happened_is_told_with_the_device_and_what_to_do() {
        let mut failed = operation(OperationResult::Failed, StateOutcome::StateLost);
        failed.failure = Some(OperationFailure {
            reason: "DEVICE_FAILED".to_owned(),
            message: "it did not leave RESUMING".to_owned(),
            device: "devices/a".to_owned(),
        });
        failed.devices = vec![OperationDevice {
            device: "devices/b".to_owned(),
            standing: DeviceStanding::Quarantined.into(),
            ..OperationDevice::default()
        }];
        insta::assert_snapshot!(judge(&failed).1.unwrap(), @"
        operations/1 has failed; at least one device has lost its state; start its workload anew or restore it
          DEVICE_FAILED (devices/a): it did not leave RESUMING
          devices/b is quarantined; reset it with `vfioctl devices reset` once it is clear what may become of its state
        ");
    }
}
