//! What a source and its destination have agreed on in Prepare, and what the source says about it after that.
//!
//! ```text
//!   Entry --of--> Agreed --commit, abandon, look--> call with a proof --> destination
//!                   record <--only with a proof-- answer
//! ```
//! The destination is called by its identity alone, whatever key it has by now (see `peer`), and an identity may be that of
//! many agents. That the one that answers is the one that took the devices its proof tells, and that the source is the one
//! that brought them the source's: see [`proof`](vfio_checkpoint_proto::proof).
//!
//! # Invariants
//! - The secret is not in what is sent.
//! - An answer without the right proof is no answer. A refusal has none, so it tells nobody how a hand-over stands.

use bytes::Bytes;
use vfio_checkpoint_client::call::Client;
use vfio_checkpoint_fsm::handover::Verdict;
use vfio_checkpoint_proto::ids::{Epoch, OperationName, Ticket};
use vfio_checkpoint_proto::proof::{Claim, Proven as _};
use vfio_checkpoint_proto::v1;

use super::peer::PeerError;
use crate::failpoint::reached;
use crate::operation::Entry;

/// What was agreed on.
#[derive(Debug)]
pub(super) struct Agreed {
    operation: OperationName,
    secret: Ticket,
    epochs: Vec<Epoch>,
}

impl Agreed {
    /// What a migration has on record of it. None where nothing was prepared.
    pub(super) fn of(entry: &Entry) -> Option<Self> {
        let record = entry.view().handover?.record;
        Some(Self { operation: record.operation?, secret: record.secret?, epochs: record.epochs })
    }

    /// The same for who must have it.
    pub(super) fn on_record(entry: &Entry) -> Result<Self, PeerError> {
        let nothing = || PeerError::Answer("the record here does not say what was prepared there".to_owned());
        Self::of(entry).ok_or_else(nothing)
    }

    /// Run the devices.
    pub(super) async fn commit(&self, client: &Client) -> Result<v1::HandoverRecord, PeerError> {
        let request = v1::CommitHandoverRequest {
            operation: self.operation.to_string(),
            epochs: self.epochs.iter().map(|epoch| epoch.0).collect(),
            proof: Bytes::new(),
        };
        reached(format_args!("commit is sent"));
        let answer = client.commit_handover(request.proven(&self.secret)).await.map_err(PeerError::Call)?;
        reached(format_args!("commit is answered"));
        self.believed(answer.handover, &answer.proof)
    }

    /// Nothing comes.
    pub(super) async fn abandon(
        &self,
        client: &Client,
        reason: String,
    ) -> Result<v1::HandoverRecord, PeerError> {
        let operation = self.operation.to_string();
        let request = v1::AbandonHandoverRequest { operation, reason, proof: Bytes::new() };
        let answer = client.abandon_handover(request.proven(&self.secret)).await.map_err(PeerError::Call)?;
        self.believed(answer.handover, &answer.proof)
    }

    /// What is on record there? Where it is `settled` here it may be forgotten there.
    pub(super) async fn look(&self, client: &Client, settled: bool) -> Result<v1::HandoverRecord, PeerError> {
        let operation = self.operation.to_string();
        let request = v1::GetHandoverRequest { operation, settled, proof: Bytes::new() };
        let answer = client.get_handover(request.proven(&self.secret)).await.map_err(PeerError::Call)?;
        self.believed(answer.handover, &answer.proof)
    }

    fn believed(
        &self,
        found: Option<v1::HandoverRecord>,
        proof: &[u8],
    ) -> Result<v1::HandoverRecord, PeerError> {
        let found = found.ok_or_else(|| PeerError::Answer("it has no record in it".to_owned()))?;
        let is_proven = Claim::new(&found, proof).is_ok_and(|claim| claim.holds(&self.secret));
        if is_proven { Ok(found) } else { Err(PeerError::Unproven) }
    }
}

/// What a destination has decided. None where it has not.
pub(super) fn verdict(told: &v1::HandoverRecord) -> Option<Verdict> {
    match told.verdict() {
        v1::HandoverVerdict::Unspecified => None,
        v1::HandoverVerdict::Committed => Some(Verdict::Committed),
        v1::HandoverVerdict::Refused => Some(Verdict::Refused),
        v1::HandoverVerdict::Lost => Some(Verdict::Lost),
        v1::HandoverVerdict::Broken => Some(Verdict::Broken),
    }
}
