//! Checkpoints of a store.

use serde::Serialize;
use vfio_checkpoint_client::call::printable;
use vfio_checkpoint_proto::v1;

use super::{Column, Detail, bytes, hex, moment, rows, said, seconds, short, usual, wide};
use crate::values::short_checkpoint;

/// A checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct CheckpointDoc {
    pub(crate) name: String,
    pub(crate) create_time: Option<String>,
    pub(crate) consistency: &'static str,
    pub(crate) size_bytes: u64,
    pub(crate) added: Option<AddedDoc>,
    pub(crate) source_disposition: &'static str,
    pub(crate) caller: String,
    pub(crate) owner_pod: String,
    pub(crate) node: String,
    pub(crate) damage: String,
    pub(crate) devices: Vec<DeviceStateDoc>,
}

/// What a checkpoint added to its store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct AddedDoc {
    pub(crate) chunks: u64,
    pub(crate) plain_bytes: u64,
    pub(crate) stored_bytes: u64,
}

/// The state of one device in a checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct DeviceStateDoc {
    pub(crate) source_device: String,
    pub(crate) driver: String,
    pub(crate) logical_device: String,
    pub(crate) epoch: u64,
    pub(crate) length_bytes: Option<u64>,
    pub(crate) blake3: Option<String>,
}

impl AddedDoc {
    pub(crate) fn text(&self) -> String {
        format!(
            "{} to the store ({} of state in {} new chunks)",
            bytes(self.stored_bytes),
            bytes(self.plain_bytes),
            self.chunks
        )
    }
}

impl CheckpointDoc {
    pub(crate) fn new(checkpoint: &v1::Checkpoint) -> Self {
        let manifest = checkpoint.manifest.as_ref();
        let devices = manifest.map(|manifest| manifest.devices.as_slice()).unwrap_or_default();
        Self {
            name: checkpoint.name.clone(),
            create_time: moment(manifest.and_then(|manifest| manifest.create_time.as_ref())),
            consistency: short(checkpoint.consistency().as_str_name(), "CHECKPOINT_CONSISTENCY_"),
            size_bytes: checkpoint.size_bytes,
            added: checkpoint.added.as_ref().map(|added| AddedDoc {
                chunks: added.chunks,
                plain_bytes: added.plain_bytes,
                stored_bytes: added.stored_bytes,
            }),
            source_disposition: manifest.map_or("UNSPECIFIED", |manifest| {
                short(manifest.source_disposition().as_str_name(), "SOURCE_DISPOSITION_")
            }),
            caller: checkpoint.caller.clone(),
            owner_pod: checkpoint.owner_pod.clone(),
            node: checkpoint.node.clone(),
            damage: checkpoint.damage.clone(),
            devices: devices
                .iter()
                .enumerate()
                .map(|(index, device)| DeviceStateDoc::new(device, checkpoint.seals.get(index)))
                .collect(),
        }
    }
}

impl DeviceStateDoc {
    pub(crate) fn new(device: &v1::DeviceManifest, seal: Option<&v1::Seal>) -> Self {
        let logical = device.logical_device.as_ref();
        Self {
            source_device: device.source_device.clone(),
            driver: device.driver.clone(),
            logical_device: logical.map(|logical| logical.id.clone()).unwrap_or_default(),
            epoch: logical.map(|logical| logical.epoch).unwrap_or_default(),
            length_bytes: seal.map(|seal| seal.length_bytes),
            blake3: seal.map(|seal| hex(&seal.blake3)),
        }
    }
}

const COLUMNS: [Column<CheckpointDoc>; 10] = [
    usual("NAME", |checkpoint| printable(&short_checkpoint(&checkpoint.name))),
    usual("CREATED", |checkpoint| seconds(checkpoint.create_time.as_ref())),
    usual("SIZE", |checkpoint| bytes(checkpoint.size_bytes)),
    usual("ADDED", |checkpoint| checkpoint.added.map(|added| bytes(added.stored_bytes)).unwrap_or_default()),
    usual("STATE", |checkpoint| {
        if checkpoint.damage.is_empty() { said(checkpoint.consistency) } else { "DAMAGED".to_owned() }
    }),
    wide("DEVICES", |checkpoint| {
        let names: Vec<String> =
            checkpoint.devices.iter().map(|device| printable(&device.source_device)).collect();
        names.join(",")
    }),
    wide("SOURCE", |checkpoint| said(checkpoint.source_disposition)),
    wide("NODE", |checkpoint| printable(&checkpoint.node)),
    wide("POD", |checkpoint| printable(&checkpoint.owner_pod)),
    wide("CALLER", |checkpoint| printable(&checkpoint.caller)),
];

pub(crate) fn checkpoints(detail: Detail, checkpoints: &[CheckpointDoc]) -> String {
    let mut text = rows(detail, &COLUMNS, checkpoints);
    for checkpoint in checkpoints.iter().filter(|checkpoint| !checkpoint.damage.is_empty()) {
        let name = printable(&short_checkpoint(&checkpoint.name));
        text.extend([format!("{name} cannot be read: {}\n", printable(&checkpoint.damage))]);
    }
    text
}

const STATE_COLUMNS: [Column<DeviceStateDoc>; 6] = [
    usual("DEVICE", |state| printable(&state.source_device)),
    usual("DRIVER", |state| printable(&state.driver)),
    usual("SIZE", |state| state.length_bytes.map(bytes).unwrap_or_default()),
    usual("LOGICAL_DEVICE", |state| printable(&state.logical_device)),
    usual("EPOCH", |state| state.epoch.to_string()),
    wide("BLAKE3", |state| state.blake3.clone().unwrap_or_default()),
];

/// The states in one checkpoint.
pub(crate) fn device_states(detail: Detail, states: &[DeviceStateDoc]) -> String {
    rows(detail, &STATE_COLUMNS, states)
}
