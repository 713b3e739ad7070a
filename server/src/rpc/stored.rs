//! Checkpoints in the agent's stores: looked at, listed, deleted, verified.

use std::pin::Pin;

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tracing::Instrument as _;
use vfio_checkpoint_client::document::About;
use vfio_checkpoint_proto::domain::{CheckpointQuery, checkpoint_name};
use vfio_checkpoint_proto::ids::CheckpointName;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_store::{CheckpointId, Listed, Manifest};

use super::{Refusal, messages};
use crate::core::Core;
use crate::journal::Owed;
use crate::operation::about;
use crate::security::authorize::Caller;
use crate::security::roles::Role;

/// A verification says how far it is after so many bytes.
const PROGRESS_BYTES: u64 = 64 << 20;

pub(super) type Verification =
    Pin<Box<dyn Stream<Item = Result<v1::VerifyCheckpointResponse, Status>> + Send>>;

/// One checkpoint.
pub(super) async fn get(core: &Core, name: &str) -> Result<v1::Checkpoint, Refusal> {
    let name = checkpoint_name(name)?;
    let (checkpoint, about) = core.stored(&name).await?;
    Ok(messages::checkpoint(&name, &checkpoint.manifest, &about, checkpoint.is_inconsistent))
}

/// A page of a store, the newest first.
pub(super) async fn list(
    core: &Core,
    query: CheckpointQuery,
) -> Result<v1::ListCheckpointsResponse, Refusal> {
    let place = match &query.store {
        Some(name) => core.place(name)?,
        None => core.stores.get(None).ok_or(Refusal::PageToken)?,
    };
    let before = match &query.page.token {
        Some(token) => Some(token.as_str().parse::<CheckpointId>().map_err(|_| Refusal::PageToken)?),
        None => None,
    };
    let failed = |error| Refusal::Store { at: place.name().to_string(), error: Box::new(error) };
    let owed = core.stores.debts().of_store(place.name());
    let store = place.open().await.map_err(failed)?;
    let page = store.list(before, query.page.size).await.map_err(failed)?;
    let mut checkpoints = Vec::with_capacity(page.checkpoints.len());
    if !owed.is_empty() {
        core.stores.debts().nudge();
    }
    for listed in &page.checkpoints {
        let name = place.checkpoint(listed.id).map_err(|error| Refusal::invalid("name", error))?;
        match owed.get(&name) {
            Some(Owed::Discard) => {}
            Some(Owed::Inconsistent) => checkpoints.push(shown(&name, listed, true)),
            None => checkpoints.push(shown(&name, listed, listed.is_inconsistent)),
        }
    }
    let next_page_token = page.next.map(|id| id.to_string()).unwrap_or_default();
    Ok(v1::ListCheckpointsResponse { checkpoints, next_page_token })
}

/// What cannot be read is shown too: somebody has to delete it.
fn shown(name: &CheckpointName, listed: &Listed, is_inconsistent: bool) -> v1::Checkpoint {
    let read = match &listed.manifest {
        Ok(manifest) => read(name, manifest).map_err(|refusal| refusal.to_string()),
        Err(damage) => Err(damage.clone()),
    };
    match read {
        Ok((manifest, about)) => messages::checkpoint(name, manifest, &about, is_inconsistent),
        Err(damage) => v1::Checkpoint { name: name.to_string(), damage, ..v1::Checkpoint::default() },
    }
}

fn read<'a>(name: &CheckpointName, manifest: &'a Manifest) -> Result<(&'a Manifest, About), Refusal> {
    Ok((manifest, about(name, &manifest.about)?))
}

/// Deletes a checkpoint of the caller's, or as an admin any.
pub(super) async fn delete(core: &Core, name: &str, caller: &Caller) -> Result<(), Refusal> {
    let name = checkpoint_name(name)?;
    if !caller.roles.contains(Role::Admin) {
        // Whose a damaged one is cannot be told, so that takes an admin.
        let (_, about) = core.stored(&name).await?;
        if about.caller != caller.identity.to_string() {
            return Err(Refusal::NotYourCheckpoint(name));
        }
    }
    if core.stores.debts().of(&name) == Some(Owed::Discard) {
        return Err(Refusal::CheckpointNotFound(name));
    }
    let failed = |error| Refusal::Store { at: name.to_string(), error: Box::new(error) };
    let id = name.id().parse().map_err(|_| Refusal::CheckpointNotFound(name.clone()))?;
    let store = core.place(&name.store())?.open().await.map_err(failed)?;
    store.delete(id).await.map_err(|error| {
        if error.is_not_found() { Refusal::CheckpointNotFound(name.clone()) } else { failed(error) }
    })
}

/// Verifies a checkpoint. It ends when its caller stops listening.
pub(super) async fn verify(core: &Core, name: &str) -> Result<Verification, Refusal> {
    let name = checkpoint_name(name)?;
    let (checkpoint, _) = core.stored(&name).await?;
    let total_bytes = checkpoint.manifest.plain_bytes();
    let (id, failed) =
        (checkpoint.manifest.id, |error| Refusal::Store { at: name.to_string(), error: Box::new(error) });
    let store = core.place(&name.store())?.open().await.map_err(failed)?.clone();
    let (tell, told) = mpsc::channel(4);
    let work = async move {
        let mut told_bytes = 0;
        let progress = |verified_bytes: u64| {
            if verified_bytes - told_bytes >= PROGRESS_BYTES {
                told_bytes = verified_bytes;
                let message =
                    v1::VerifyCheckpointResponse { verified_bytes, total_bytes, ..Default::default() };
                // A listener that is behind misses some of them, and not the last.
                let _ = tell.try_send(Ok(message));
            }
        };
        let verified = tokio::select! {
            biased;
            verified = store.verify(id, progress) => verified,
            () = tell.closed() => return,
        };
        let last = match verified {
            Ok(verified) => Ok(v1::VerifyCheckpointResponse {
                verified_bytes: verified.plain_bytes,
                total_bytes,
                done: true,
                problems: verified.problems,
            }),
            Err(error) => Err(Refusal::Store { at: name.to_string(), error: Box::new(error) }.into()),
        };
        let _ = tell.send(last).await;
    };
    core.tasks.spawn(work.in_current_span());
    Ok(Box::pin(ReceiverStream::new(told)))
}
