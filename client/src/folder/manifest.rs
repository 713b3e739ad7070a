//! `manifest.json`: what a saved state is, for people and programs.
//!
//! ```text
//!   FolderManifest (serde, unknown fields refused) <-> v1::CheckpointManifest + one SavedDevice each
//! ```
//!
//! Invariants: enum values stand by their names in the contract. File names are checked against what they must be and
//! are never used as paths. Failure paths: each refusal names the field.

use serde::{Deserialize, Serialize};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_seal::Seal;

use super::{MAX_DEVICES, state_file};
use crate::document::{Config, Consistency, Manifest, Problem, problem};

/// The version that this program writes and reads.
pub(super) const FORMAT_VERSION: u32 = 1;

/// The whole of `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FolderManifest {
    /// Version of this file.
    pub format_version: u32,
    /// What the checkpoint is worth.
    pub consistency: Consistency,
    /// What the agent said of it.
    pub manifest: Manifest,
    /// The files, one a device, in the order of the set.
    pub devices: Vec<SavedDevice>,
}

/// One device's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SavedDevice {
    /// Its name, always `device-N.state`.
    pub file: String,
    /// Its length.
    pub length_bytes: u64,
    /// BLAKE3 of it, 64 hexadecimal digits.
    pub blake3: String,
    /// What was captured of configuration space.
    pub config: Option<Config>,
}

impl FolderManifest {
    /// Checks what can be checked without the files.
    pub(super) fn check(&self) -> Result<(), Problem> {
        if self.devices.is_empty() || self.devices.len() > MAX_DEVICES {
            return Err(problem(
                "devices",
                format!("there are {}, but 1 to 64 are possible", self.devices.len()),
            ));
        }
        if self.devices.len() != self.manifest.devices.len() {
            let text = format!("there are {}, but {} files", self.manifest.devices.len(), self.devices.len());
            return Err(problem("manifest.devices", text));
        }
        for (index, device) in self.devices.iter().enumerate() {
            if device.file != state_file(index) {
                let text = format!("it must be {:?}", state_file(index));
                return Err(problem(format!("devices[{index}].file"), text));
            }
            device.seal().map_err(|text| problem(format!("devices[{index}].blake3"), text))?;
            device.config_to_wire().map_err(|text| problem(format!("devices[{index}].config"), text))?;
        }
        self.manifest.to_wire().map(|_| ())
    }
}

impl SavedDevice {
    pub(super) fn new(
        index: usize,
        seal: &Seal,
        config: Option<&v1::ConfigSpaceCapture>,
    ) -> Result<Self, String> {
        let config = config.map(Config::from_wire).transpose()?;
        Ok(Self { file: state_file(index), length_bytes: seal.bytes, blake3: seal.hex(), config })
    }

    /// Length and digest.
    pub fn seal(&self) -> Result<Seal, String> {
        let hash = blake3::Hash::from_hex(&self.blake3).map_err(|error| error.to_string())?;
        Ok(Seal { bytes: self.length_bytes, blake3: *hash.as_bytes() })
    }

    /// What was captured of configuration space, as in the contract.
    pub fn config_to_wire(&self) -> Result<Option<v1::ConfigSpaceCapture>, String> {
        self.config.as_ref().map(Config::to_wire).transpose()
    }
}
