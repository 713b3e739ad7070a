//! What an admin decides about a migration that is in doubt.
//!
//! ```text
//!   Resolve -> the destination is asked once more -> Evidence -> fsm::handover::resolve
//!     taken   -> on record, with who and why -> said to the task, which goes on by it
//!     refused -> told, with what would do
//! ```
//! # Invariants
//! - A decision is on record before anything is done by it, and an audit line says who made it.

use std::sync::Arc;

use vfio_checkpoint_device::chain;
use vfio_checkpoint_fsm::handover::{Evidence, Resolution, Unresolvable, resolve};
use vfio_checkpoint_proto::domain::{self, ResolveSpec};
use vfio_checkpoint_proto::ids::OperationName;
use vfio_checkpoint_proto::v1;

use super::peer::{PeerError, record};
use crate::core::Core;
use crate::journal::Change;
use crate::operation::record::{JobRecord, PeerRecord, RecordedStep, ResolutionRecord, VerdictRecord};
use crate::operation::{Entry, Refused};
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
        let view = entry.view();
        let is_in_doubt = entry.on_record() == RecordedStep::Committing && view.end.is_none();
        if !is_in_doubt {
            return Err(refused(Refused::NotInDoubt { phase: view.phase }));
        }
        let destination = self.ask(&entry).await.map_err(|error| chain(&error));
        let evidence = evidence(&entry, destination.as_ref().ok());
        let resolution = match spec.resolution {
            domain::Resolution::ResumeHere => Resolution::ResumeHere,
            domain::Resolution::LetGo => Resolution::LetGo,
        };
        let decided = resolve(evidence, resolution, spec.is_stated);
        if spec.validate_only {
            return Ok(Resolved { entry, destination, refused: decided.err() });
        }
        decided.map_err(|why| refused(Refused::Unresolvable(why)))?;
        let decision = ResolutionRecord {
            resume_here: resolution == Resolution::ResumeHere,
            by,
            at: self.environment.unix_now(),
            statement: spec.statement,
        };
        let told = destination.as_ref().ok().and_then(verdict);
        self.put_on_record(&name, &entry, decision, told).await?;
        entry.signals.say_resolved();
        Ok(Resolved { entry, destination, refused: None })
    }

    async fn put_on_record(
        &self,
        name: &OperationName,
        entry: &Entry,
        decision: ResolutionRecord,
        told: Option<VerdictRecord>,
    ) -> Result<(), Refusal> {
        // One decision: the first that is on record stays. Nor may the task move on meanwhile.
        let _one_at_a_time = entry.recording.lock().await;
        let mut record = entry.record(RecordedStep::Committing);
        let still = entry.on_record() == RecordedStep::Committing;
        let free = record.handover.as_ref().is_some_and(|handover| handover.resolution.is_none());
        if !still || !free {
            let phase = entry.view().phase;
            return Err(Refusal::Operation {
                operation: name.clone(),
                refused: Refused::NotInDoubt { phase },
            });
        }
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
