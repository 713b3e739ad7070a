//! What an admin decides about a migration that is in doubt.
//!
//! ```text
//!   Resolve -> the destination is asked once more -> Evidence -> fsm::handover::resolve
//!           -> the devices here are read back: shown to whoever decides, and decided by nobody else
//!     taken   -> on record, with who and why -> said to the task, which goes on by it
//!     refused -> told, with what would do
//! ```
//! The destination may answer the task while an admin decides. Both take what they know in under the entry's `recording`,
//! so that one of them comes first: a decision that is on record is obeyed, whatever answer comes in after it, and one
//! that comes after an answer is judged by that.
//!
//! # Invariants
//! - A decision is on record before anything is done by it, and an audit line says who made it.
//! - What is answered with success is what is done. Nothing is decided once the task has heard what it goes on by.
//! - Nothing is decided for a caller that has hung up: what was true when it asked, as that the other side is fenced, may not
//!   be any more. Only one that hangs up while the decision is being written finds it taken, and in the operation.
//!
//! # Failure paths
//! A device that does not answer soon is told as UNKNOWN: it keeps nobody waiting who has to decide.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join, join_all};
use vfio_checkpoint_device::chain;
use vfio_checkpoint_fsm::State;
use vfio_checkpoint_fsm::handover::{Evidence, Resolution, Unresolvable, Verdict, resolve};
use vfio_checkpoint_proto::domain::{self, ResolveSpec};
use vfio_checkpoint_proto::ids::DeviceName;
use vfio_checkpoint_proto::v1;

use super::agreed::{Agreed, verdict};
use super::peer::PeerError;
use crate::core::Core;
use crate::journal::Change;
use crate::operation::record::{
    JobRecord, OperationDeviceRecord, PeerRecord, RecordedStep, ResolutionRecord, VerdictRecord,
};
use crate::operation::{Entry, Phase, Refused};
use crate::registry::{DeviceView, Standing};
use crate::rpc::{Asker, Refusal};

/// How long the devices of the source have to say how they are. Well under what a client waits for its answer.
const LOOK: Duration = Duration::from_secs(3);

/// What came of it.
#[derive(Debug)]
pub struct Resolved {
    /// The migration.
    pub entry: Arc<Entry>,
    /// What the destination said just now, or why it did not.
    pub destination: Result<v1::HandoverRecord, String>,
    /// Why the decision would not be taken. Only where it was to be validated.
    pub refused: Option<Unresolvable>,
    /// What the source itself has, in the order of the set.
    pub devices: Vec<SourceDevice>,
}

/// A device of the source.
#[derive(Debug)]
pub struct SourceDevice {
    /// Which one.
    pub name: DeviceName,
    /// As it was read back just now, without a state where it did not answer. None where it is not configured any more.
    pub view: Option<DeviceView>,
    /// Whether it has what was to move.
    pub copy: SourceCopy,
}

/// Whether a device of the source still carries the state that was to move, as the contract has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceCopy {
    /// It does, and stands still.
    Kept,
    /// It was reset since.
    Gone,
    /// It does, and runs: somebody else has moved it.
    MovedOn,
    /// Nobody can tell.
    Unknown,
}

impl Core {
    /// Decides about a migration that is in doubt, or says whether it could be.
    pub async fn resolve(&self, spec: ResolveSpec, by: String, asker: Asker) -> Result<Resolved, Refusal> {
        let name = spec.operation;
        let refused = |refused| Refusal::Operation { operation: name.clone(), refused };
        let entry = self.operations.get(&name).ok_or_else(|| Refusal::OperationNotFound(name.clone()))?;
        if !matches!(entry.fixed.job, JobRecord::Migrate { .. }) {
            return Err(refused(Refused::NotAMigration));
        }
        let not_in_doubt = || refused(Refused::NotInDoubt { phase: entry.view().phase });
        if !is_in_doubt(&entry) {
            return Err(not_in_doubt());
        }
        let (destination, devices) = join(self.ask(&entry), self.source_devices(&entry)).await;
        let destination = destination.map_err(|error| chain(&error));
        let told = destination.as_ref().ok();
        let resolution = match spec.resolution {
            domain::Resolution::ResumeHere => Resolution::ResumeHere,
            domain::Resolution::LetGo => Resolution::LetGo,
        };
        // From here on the task hears nothing, and puts nothing on record: what is decided by is what holds until the
        // decision is on record. Meanwhile it may have heard more than was said just now.
        let _one_at_a_time = entry.recording.lock().await;
        if !is_in_doubt(&entry) {
            return Err(not_in_doubt());
        }
        let decided = resolve(evidence(&entry, told), resolution, spec.is_stated);
        if spec.validate_only {
            return Ok(Resolved { entry: Arc::clone(&entry), destination, refused: decided.err(), devices });
        }
        decided.map_err(|why| refused(Refused::Unresolvable(why)))?;
        if asker.is_gone() {
            return Err(refused(Refused::CallerGone));
        }
        let decision = ResolutionRecord {
            resume_here: resolution == Resolution::ResumeHere,
            by,
            at: self.environment.unix_now(),
            statement: spec.statement,
        };
        self.put_on_record(&entry, decision, told.and_then(verdict).map(Into::into)).await?;
        entry.signals.say_resolved();
        Ok(Resolved { entry: Arc::clone(&entry), destination, refused: None, devices })
    }

    /// Under the entry's `recording`.
    async fn put_on_record(
        &self,
        entry: &Entry,
        decision: ResolutionRecord,
        told: Option<VerdictRecord>,
    ) -> Result<(), Refusal> {
        let mut record = entry.record(RecordedStep::Committing);
        if let Some(handover) = &mut record.handover {
            handover.resolution = Some(decision.clone());
            // What was decided by is the first that was heard of it, where the answer to Commit was not: the end is told by
            // it, and a verdict stays.
            handover.verdict = handover.verdict.or(told);
        }
        self.journal.commit(vec![Change::Operation(Box::new(record))]).await?;
        entry.hand_over(|handover| {
            handover.record.resolution = Some(decision);
            handover.record.verdict = handover.record.verdict.or(told);
        });
        Ok(())
    }

    /// What the devices of the source are found to be.
    async fn source_devices(&self, entry: &Entry) -> Vec<SourceDevice> {
        let found = entry.fixed.devices.iter().map(|device| async {
            let slot = self.registry.get(&device.device);
            let mut view = None;
            if let Some(slot) = slot {
                let is_read = tokio::select! {
                    biased;
                    () = slot.read_back() => true,
                    () = self.environment.sleep(LOOK) => false,
                };
                let found = slot.view();
                // What was read before says nothing about now.
                view = Some(DeviceView { state: found.state.filter(|_| is_read), ..found });
            }
            let copy = view.as_ref().map_or(SourceCopy::Unknown, |view| SourceCopy::of(device, view));
            SourceDevice { name: device.device.clone(), view, copy }
        });
        join_all(found).await
    }

    async fn ask(&self, entry: &Entry) -> Result<v1::HandoverRecord, PeerError> {
        let nobody = || PeerError::Answer("it is not on record who is there".to_owned());
        let peer: &PeerRecord = entry.fixed.peer.as_ref().ok_or_else(nobody)?;
        let agreed = Agreed::on_record(entry)?;
        agreed.look(&self.dial(peer).await?, false).await
    }
}

impl SourceCopy {
    /// What is in a device of which the hand-over has on record what was in it. One that had to be opened anew was reset by
    /// that, and has somebody new on record.
    fn of(device: &OperationDeviceRecord, view: &DeviceView) -> Self {
        let (Some(lives), Some((state, _))) = (&view.record, view.state) else { return Self::Unknown };
        let answers = match &view.standing {
            Standing::Ready | Standing::Quarantined => true,
            Standing::Hung(_) | Standing::Unavailable(_) | Standing::NotMigratable(_) => false,
        };
        if !answers {
            Self::Unknown
        } else if lives.logical != device.logical || lives.epoch != device.epoch {
            Self::Gone
        } else if state == State::Stop {
            Self::Kept
        } else if state.is_running() {
            Self::MovedOn
        } else {
            Self::Unknown
        }
    }
}

/// Whether nobody has decided yet, neither the destination, as far as the task knows, nor an admin.
///
/// That Commit was to be sent may be on record although the write of it failed. Then the phase was not reached, and the
/// task takes it back.
fn is_in_doubt(entry: &Entry) -> bool {
    let view = entry.view();
    let waits = entry.on_record() == RecordedStep::Committing && view.phase == Phase::Committing;
    waits
        && view.handover.is_some_and(|handover| {
            let goes_on = handover.record.verdict.and_then(|heard| Verdict::from(heard).event());
            handover.record.resolution.is_none() && goes_on.is_none()
        })
}

/// What is known of the destination. What it has said once it cannot take back.
fn evidence(entry: &Entry, told: Option<&v1::HandoverRecord>) -> Evidence {
    let known = entry.view().handover.and_then(|handover| handover.record.verdict);
    let known = known.map(Into::into).or_else(|| told.and_then(verdict));
    match (known, told) {
        (Some(verdict), _) => Evidence::Told(verdict),
        (None, Some(_)) => Evidence::Undecided,
        (None, None) => Evidence::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::UnixMillis;
    use crate::operation::record::{HandoverRecord, OperationRecord};

    /// A migration at `step`, of which so much is known.
    fn migration(
        step: RecordedStep,
        verdict: Option<VerdictRecord>,
        resolution: Option<ResolutionRecord>,
    ) -> Entry {
        let peer = PeerRecord::Destination {
            endpoint: "https://node2.example:7443".to_owned(),
            spiffe_id: None,
            key: None,
        };
        let handover = HandoverRecord { verdict, resolution, ..HandoverRecord::new(peer) };
        Entry::recorded(OperationRecord {
            name: "operations/1".parse().unwrap(),
            job: JobRecord::Migrate {
                pre_copy: false,
                barrier: false,
                manual_cutover: false,
                manual_commit: false,
            },
            devices: Vec::new(),
            caller: "spiffe://example.org/ops".to_owned(),
            request_id: None,
            owner_pod: String::new(),
            created: UnixMillis(0),
            trace_id: None,
            checkpoint: None,
            handover: Some(Box::new(handover)),
            step,
        })
    }

    #[test]
    fn nothing_is_decided_about_a_source_that_goes_on_by_itself() {
        let asks = |verdict| is_in_doubt(&migration(RecordedStep::Committing, verdict, None));
        assert!(asks(None) && asks(Some(VerdictRecord::Lost)) && asks(Some(VerdictRecord::Broken)));
        // It has its answer, and has not put on record yet what it does about it.
        assert!(!asks(Some(VerdictRecord::Committed)) && !asks(Some(VerdictRecord::Refused)));
        for step in [RecordedStep::Begun, RecordedStep::LettingGo] {
            assert!(!is_in_doubt(&migration(step, None, None)));
        }
        let decided = ResolutionRecord {
            resume_here: true,
            by: "spiffe://example.org/admin".to_owned(),
            at: UnixMillis(0),
            statement: String::new(),
        };
        assert!(!is_in_doubt(&migration(RecordedStep::Committing, None, Some(decided))));
    }
}
