//! A checkpoint of a store on the wire.

use vfio_checkpoint_client::document::About;
use vfio_checkpoint_proto::ids::CheckpointName;
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_store::Manifest;

/// A checkpoint, as its manifest and its maker say.
pub(in crate::rpc) fn checkpoint(
    name: &CheckpointName,
    manifest: &Manifest,
    about: &About,
    is_inconsistent: bool,
) -> v1::Checkpoint {
    let said = about.manifest.to_wire();
    let consistency = if is_inconsistent {
        v1::CheckpointConsistency::Inconsistent
    } else {
        v1::CheckpointConsistency::Consistent
    };
    v1::Checkpoint {
        name: name.to_string(),
        damage: said
            .as_ref()
            .err()
            .map(|(field, problem)| format!("its {field}: {problem}"))
            .unwrap_or_default(),
        manifest: said.ok(),
        consistency: consistency.into(),
        seals: manifest.states.iter().map(|state| super::operation::seal(state.seal)).collect(),
        size_bytes: manifest.plain_bytes(),
        added: Some(v1::CheckpointAdded {
            chunks: manifest.added.chunks,
            plain_bytes: manifest.added.plain_bytes,
            stored_bytes: manifest.added.stored_bytes,
        }),
        caller: about.caller.clone(),
        owner_pod: about.owner_pod.clone(),
        node: about.node.clone(),
    }
}
