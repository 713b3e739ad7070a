//! The store of the agent on loopback: checkpoints that tests put there, in pages of one.

use std::sync::{Arc, Mutex};

use tonic::Status;
use vfio_checkpoint_proto::v1;

#[derive(Clone, Default)]
pub(crate) struct Shelf {
    /// The newest first.
    pub(crate) checkpoints: Arc<Mutex<Vec<v1::Checkpoint>>>,
    /// What a verification says, step by step.
    pub(crate) steps: Arc<Mutex<Vec<v1::VerifyCheckpointResponse>>>,
    /// What was asked to be restored.
    pub(crate) restores: Arc<Mutex<Vec<v1::RestoreRequest>>>,
    /// What calls are answered before they succeed.
    pub(crate) away: Arc<Mutex<Vec<Status>>>,
    /// How many calls there were.
    pub(crate) calls: Arc<Mutex<usize>>,
    /// Which stores were listed.
    pub(crate) parents: Arc<Mutex<Vec<String>>>,
}

pub(crate) fn name(id: &str) -> String {
    format!("stores/local/checkpoints/{id}")
}

pub(crate) fn checkpoint(id: &str) -> v1::Checkpoint {
    v1::Checkpoint {
        name: name(id),
        manifest: Some(crate::server::manifest().into()),
        consistency: v1::CheckpointConsistency::Consistent.into(),
        seals: vec![v1::Seal { length_bytes: 5 << 20, blake3: vec![0xab; 32].into() }],
        size_bytes: 5 << 20,
        added: Some(v1::CheckpointAdded { chunks: 3, plain_bytes: 200 << 10, stored_bytes: 100 << 10 }),
        caller: "spiffe://example.org/user".to_owned(),
        node: "node1".to_owned(),
        ..Default::default()
    }
}

impl Shelf {
    /// Each call comes by here.
    fn answer(&self) -> Result<(), Status> {
        *self.calls.lock().unwrap() += 1;
        self.away.lock().unwrap().pop().map_or(Ok(()), Err)
    }

    pub(crate) fn get(&self, name: &str) -> Result<v1::Checkpoint, Status> {
        self.answer()?;
        let all = self.checkpoints.lock().unwrap();
        all.iter()
            .find(|one| one.name == name)
            .cloned()
            .ok_or_else(|| Status::not_found("no such checkpoint"))
    }

    pub(crate) fn list(
        &self,
        request: &v1::ListCheckpointsRequest,
    ) -> Result<v1::ListCheckpointsResponse, Status> {
        self.answer()?;
        self.parents.lock().unwrap().push(request.parent.clone());
        let all = self.checkpoints.lock().unwrap();
        let at: usize = request.page_token.parse().unwrap_or_default();
        let next_page_token = if at + 1 < all.len() { (at + 1).to_string() } else { String::new() };
        Ok(v1::ListCheckpointsResponse {
            checkpoints: all.get(at).cloned().into_iter().collect(),
            next_page_token,
        })
    }

    pub(crate) fn delete(&self, name: &str) -> Result<(), Status> {
        self.get(name)?;
        self.checkpoints.lock().unwrap().retain(|one| one.name != name);
        Ok(())
    }

    pub(crate) fn verify(
        &self,
        name: &str,
    ) -> Result<Vec<Result<v1::VerifyCheckpointResponse, Status>>, Status> {
        self.get(name)?;
        Ok(self.steps.lock().unwrap().iter().cloned().map(Ok).collect())
    }
}
