//! What a store has to do with the beginning of an operation: whether it has room, and what it gives.

use vfio_checkpoint_client::document::About;
use vfio_checkpoint_device::chain;
use vfio_checkpoint_proto::domain::{Invalid, Manifest, RestoreSource, RestoreSpec, check_assigned};
use vfio_checkpoint_proto::ids::{CheckpointName, DeviceName, Epoch, LogicalDeviceId, StoreName};
use vfio_checkpoint_proto::v1::BlockerReason;
use vfio_checkpoint_store::{Checkpoint, CheckpointId, Store, StoreError};

use super::admission::Blocker;
use super::record::{HandoverRecord, JobRecord};
use super::run::Way;
use crate::core::Core;
use crate::journal::Owed;
use crate::rpc::Refusal;
use crate::stores::Place;

/// What an operation is asked to do, with what is decided of it.
#[derive(Debug)]
pub(crate) struct Asked<'a> {
    pub(crate) job: JobRecord,
    pub(crate) devices: Vec<(DeviceName, LogicalDeviceId, Epoch)>,
    pub(crate) owner_pod: String,
    pub(crate) kept: Option<Kept<'a>>,
    pub(crate) handover: Option<HandoverRecord>,
}

/// What an operation has to do with a store.
#[derive(Debug)]
pub(crate) enum Kept<'a> {
    /// It makes a checkpoint there.
    MadeIn(&'a Place),
    /// It takes this one.
    Taken(CheckpointName),
}

/// What is to be restored.
pub(super) struct Restorable {
    pub(super) manifest: Manifest,
    /// Where it comes from. None for the stream, which is not there yet.
    pub(super) way: Option<Way>,
    pub(super) blockers: Vec<Blocker>,
}

/// Opens a store for a save, and looks whether it has room.
pub(super) async fn make_room(
    place: &Place,
    expected_bytes: Option<u64>,
    found: &mut Vec<Blocker>,
) -> Option<Store> {
    let looked = async {
        let store = place.open().await?;
        Ok::<_, StoreError>((store, store.space().await?))
    };
    match looked.await {
        Ok((store, space)) => {
            if let (Some(space), Some(bytes)) = (space, expected_bytes)
                && bytes > space.free_bytes
            {
                found.push(Blocker::set(
                    BlockerReason::NoSpace,
                    format!(
                        "there are up to {bytes} bytes of state, and {} has room for {}; delete checkpoints, or take \
                         another store",
                        place.name(),
                        space.free_bytes
                    ),
                ));
            }
            Some(store.clone())
        }
        Err(error) => {
            let message = format!("{} cannot be used: {}", place.name(), chain(&error));
            let reason =
                if error.may_pass() { BlockerReason::StoreUnavailable } else { BlockerReason::StoreUnusable };
            found.push(Blocker::set(reason, message));
            None
        }
    }
}

impl Core {
    /// Whether too much is owed to stores for another save into one.
    pub(super) fn owes_too_much(&self) -> Option<Blocker> {
        self.stores.debts().is_full().then(|| {
            let message = "too many checkpoints wait to be marked or discarded in stores that cannot be used; look at the \
                           agent's log which they are";
            Blocker::set(BlockerReason::StoreUnavailable, message)
        })
    }

    /// The store of this name.
    pub fn place(&self, name: &StoreName) -> Result<&Place, Refusal> {
        self.stores.get(Some(name)).ok_or_else(|| Refusal::StoreNotFound(name.clone()))
    }

    /// A checkpoint of a store, and what was said of it.
    pub async fn stored(&self, name: &CheckpointName) -> Result<(Checkpoint, About), Refusal> {
        let failed = |error| Refusal::Store { at: name.to_string(), error: Box::new(error) };
        let place = self.place(&name.store())?;
        // Looked at before the store: it is forgotten only after the store has taken it.
        let owed = self.stores.debts().of(name);
        if owed == Some(Owed::Discard) {
            return Err(Refusal::CheckpointNotFound(name.clone()));
        }
        // What is no id is no checkpoint.
        let id: CheckpointId = name.id().parse().map_err(|_| Refusal::CheckpointNotFound(name.clone()))?;
        let mut checkpoint = place.open().await.map_err(failed)?.get(id).await.map_err(|error| {
            if error.is_not_found() { Refusal::CheckpointNotFound(name.clone()) } else { failed(error) }
        })?;
        if owed == Some(Owed::Inconsistent) {
            checkpoint.is_inconsistent = true;
            self.stores.debts().nudge();
        }
        let about = about(name, &checkpoint.manifest.about)?;
        Ok((checkpoint, about))
    }

    /// What a restore is asked to restore.
    pub(super) async fn restorable(&self, spec: &RestoreSpec) -> Result<Restorable, Refusal> {
        let name = match &spec.source {
            RestoreSource::Stream(manifest) => {
                return Ok(Restorable { manifest: (**manifest).clone(), way: None, blockers: Vec::new() });
            }
            RestoreSource::Checkpoint(name) => name,
        };
        let (checkpoint, about) = self.stored(name).await?;
        let damaged = |problem: String| Refusal::CheckpointDamaged { checkpoint: name.clone(), problem };
        let wire =
            about.manifest.to_wire().map_err(|(field, problem)| damaged(format!("{field}: {problem}")))?;
        let manifest = Manifest::try_from(wire).map_err(|invalid: Invalid| damaged(invalid.to_string()))?;
        if manifest.devices.len() != checkpoint.manifest.states.len() {
            let (said, are) = (manifest.devices.len(), checkpoint.manifest.states.len());
            return Err(damaged(format!("it tells of {said} devices, and there are {are} states")));
        }
        check_assigned(&spec.devices, &manifest)?;
        let mut blockers = Vec::new();
        if checkpoint.is_inconsistent && !spec.allow_inconsistent {
            blockers.push(Blocker::set(
                BlockerReason::CheckpointInconsistent,
                "the checkpoint is marked INCONSISTENT: memory that was captured with it may be newer than it; set \
                 allow_inconsistent where that does not matter",
            ));
        }
        let way = Way::OutOfStore { checkpoint: checkpoint.into(), about: about.into() };
        Ok(Restorable { manifest, way: Some(way), blockers })
    }
}

/// What was said of a checkpoint when it was made. It is not believed before it is checked.
pub(crate) fn about(name: &CheckpointName, about: &serde_json::Value) -> Result<About, Refusal> {
    serde::Deserialize::deserialize(about)
        .map_err(|error| Refusal::CheckpointDamaged { checkpoint: name.clone(), problem: error.to_string() })
}
