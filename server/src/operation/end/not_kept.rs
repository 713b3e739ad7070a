//! How an operation ends whose devices were not kept open while the agent was away.

use vfio_checkpoint_proto::ids::DeviceName;
use vfio_checkpoint_proto::v1::FailureReason;

use super::End;
use crate::operation::entry::Entry;
use crate::operation::record::{Consistency, EndOutcome, EndResult, JobRecord, RecordedStep};

/// Why what an operation had in a device counts as lost after a restart of the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::operation) enum Why {
    /// It was in the agent itself.
    Simulated,
    /// Closed with the agent.
    NoHolder,
    /// It did not outlive the agent either, or was reset meanwhile.
    NotKept,
    /// It cannot be opened now.
    NotOpen,
    /// It is not configured any more.
    NotConfigured,
}

impl Why {
    fn told_of(self, device: &DeviceName) -> String {
        match self {
            Self::Simulated => format!("{device} is simulated, and ended with the agent"),
            Self::NoHolder => format!("nobody kept {device} open: run a holder"),
            Self::NotKept => {
                format!("the holder or the process behind {device} ended too, or it was reset since")
            }
            Self::NotOpen => {
                format!("{device} is not open, so it is not known what it carries: look at its standing")
            }
            Self::NotConfigured => {
                format!(
                    "{device} is not configured any more, so it is not known what it carries: configure it again"
                )
            }
        }
    }
}

/// The agent was restarted, and devices of the operation could not be kept open meanwhile: they were reset, or are not
/// there.
pub(in crate::operation) fn not_kept(
    entry: &Entry,
    lost: Vec<(DeviceName, Why)>,
    reset: Vec<DeviceName>,
    quarantined: Vec<DeviceName>,
    step: &RecordedStep,
) -> End {
    let told: Vec<String> = lost.iter().map(|(device, why)| why.told_of(device)).collect();
    let told = told.join("; ");
    let lost: Vec<DeviceName> = lost.into_iter().map(|(device, _)| device).collect();
    let mut end = End::new(EndResult::Failed, EndOutcome::StateLost).because(
        FailureReason::AgentRestarted,
        format!(
            "the agent ended while the operation was under way, and what it had in its devices counts as lost: {told}"
        ),
        lost.first().cloned(),
    );
    end.left_stopped = *step == RecordedStep::Stopped;
    end.lost = Some(lost);
    end.reset = reset;
    end.quarantined = quarantined;
    end.kept = false;
    // Sealed before the agent ended: what was saved is whole, and may be the only copy.
    end.consistency = match (entry.fixed.job, step) {
        (
            JobRecord::Save { .. },
            RecordedStep::Held { .. } | RecordedStep::Stopped | RecordedStep::Running { inconsistent: false },
        ) => Some(Consistency::Consistent),
        (JobRecord::Save { .. }, RecordedStep::Running { inconsistent: true }) => {
            Some(Consistency::Inconsistent)
        }
        (
            JobRecord::Save { .. },
            RecordedStep::Admitted
            | RecordedStep::Begun
            | RecordedStep::Committing
            | RecordedStep::LettingGo
            | RecordedStep::Reverting
            | RecordedStep::Ended(_),
        )
        | (JobRecord::Restore { .. } | JobRecord::Migrate { .. } | JobRecord::Arrive { .. }, _) => None,
    };
    end
}
