//! What an admin decides about a migration that is in doubt.
//!
//! ```text
//!   Resolve -> the destination is asked once more -> Evidence -> fsm::handover::resolve
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

use std::sync::Arc;

use vfio_checkpoint_device::chain;
use vfio_checkpoint_fsm::handover::{Evidence, Resolution, Unresolvable, Verdict, resolve};
use vfio_checkpoint_proto::domain::{self, ResolveSpec};
use vfio_checkpoint_proto::v1;

use super::peer::{PeerError, record};
use crate::core::Core;
use crate::journal::Change;
use crate::operation::record::{JobRecord, PeerRecord, RecordedStep, ResolutionRecord, VerdictRecord};
use crate::operation::{Entry, Phase, Refused};
use crate::rpc::Refusal;

/// What came of it.
#[derive(Debug)]
pub struct Resolved {
    /// The migration.
    pub entry: Arc<Entry>,
    /// What the destination said just now, or why it did not.
    pub destination: Result<v1::HandoverRecord, String>,
    /// Why the decision would not be taken. Only where it was to be validated.
    pub refused: Option<Unresolvable>,
}

impl Core {
    /// Decides about a migration that is in doubt, or says whether it could be.
    pub async fn resolve(&self, spec: ResolveSpec, by: String) -> Result<Resolved, Refusal> {
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
        let destination = self.ask(&entry).await.map_err(|error| chain(&error));
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
            return Ok(Resolved { entry: Arc::clone(&entry), destination, refused: decided.err() });
        }
        decided.map_err(|why| refused(Refused::Unresolvable(why)))?;
        let decision = ResolutionRecord {
            resume_here: resolution == Resolution::ResumeHere,
            by,
            at: self.environment.unix_now(),
            statement: spec.statement,
        };
        self.put_on_record(&entry, decision, told.and_then(verdict)).await?;
        entry.signals.say_resolved();
        Ok(Resolved { entry: Arc::clone(&entry), destination, refused: None })
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

    async fn ask(&self, entry: &Entry) -> Result<v1::HandoverRecord, PeerError> {
        let nobody = || PeerError::Answer("it is not on record what was prepared where".to_owned());
        let peer: &PeerRecord = entry.fixed.peer.as_ref().ok_or_else(nobody)?;
        let operation = entry.view().handover.and_then(|handover| handover.record.operation);
        let operation = operation.ok_or_else(nobody)?.to_string();
        let client = self.dial(peer).await?;
        let request = v1::GetHandoverRequest { operation, settled: false, secret: bytes::Bytes::new() };
        record(client.get_handover(request).await.map_err(PeerError::Call)?.handover)
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
    let told_now = told.and_then(verdict);
    match (known.or(told_now), told) {
        (Some(verdict), _) => Evidence::Told(verdict.into()),
        (None, Some(_)) => Evidence::Undecided,
        (None, None) => Evidence::Nothing,
    }
}

/// What a destination has decided, where it has.
fn verdict(told: &v1::HandoverRecord) -> Option<VerdictRecord> {
    match told.verdict() {
        v1::HandoverVerdict::Unspecified => None,
        v1::HandoverVerdict::Committed => Some(VerdictRecord::Committed),
        v1::HandoverVerdict::Refused => Some(VerdictRecord::Refused),
        v1::HandoverVerdict::Lost => Some(VerdictRecord::Lost),
        v1::HandoverVerdict::Broken => Some(VerdictRecord::Broken),
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
        let peer =
            PeerRecord::Destination { endpoint: "https://node2.example:7443".to_owned(), spiffe_id: None };
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
