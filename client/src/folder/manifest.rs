//! `manifest.json`: what a saved state is, for people and programs.
//!
//! ```text
//!   FolderManifest (serde, unknown fields refused) <-> v1::CheckpointManifest + one SavedDevice each
//! ```
//!
//! Invariants: enum values stand by their names in the contract. File names are checked against what they must be and
//! are never used as paths. Failure paths: each refusal names the field.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use vfio_checkpoint_proto::v1;
use vfio_checkpoint_seal::Seal;

use super::{MAX_DEVICES, state_file};

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

/// What a checkpoint is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Consistency {
    /// The state of all devices at one moment, and they stayed stopped as long as the caller wanted.
    Consistent,
    /// It is not known that they did: memory that was captured along with it may have moved on.
    Inconsistent,
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

/// What a device's state does not hold of its PCI configuration space.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `PCI_COMMAND`.
    pub command: u32,
    /// By its name in the contract.
    pub interrupt_kind: String,
    /// Vectors that were armed.
    pub interrupt_vectors: u32,
}

/// `CheckpointManifest` of the contract.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format_version: u32,
    /// The save that it comes from.
    pub operation: String,
    /// RFC 3339.
    create_time: Option<String>,
    source_disposition: String,
    devices: Vec<Device>,
}

#[allow(clippy::struct_field_names, reason = "the names are those of the contract")]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Device {
    source_device: String,
    source_address: String,
    backend: String,
    driver: String,
    fingerprint: Option<BTreeMap<String, String>>,
    logical_device: Option<LogicalDevice>,
    data_size: Option<DataSize>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LogicalDevice {
    id: String,
    epoch: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DataSize {
    kind: String,
    bytes: u64,
}

/// A field and what is wrong with it.
pub(super) type Problem = (String, String);

fn problem(field: impl Into<String>, problem: impl Into<String>) -> Problem {
    (field.into(), problem.into())
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
        let config = config
            .map(|config| {
                Ok::<_, String>(Config {
                    command: config.command,
                    interrupt_kind: name_of(config.interrupt_kind, v1::InterruptKind::as_str_name)?,
                    interrupt_vectors: config.interrupt_vectors,
                })
            })
            .transpose()?;
        Ok(Self { file: state_file(index), length_bytes: seal.bytes, blake3: seal.hex(), config })
    }

    /// Length and digest.
    pub fn seal(&self) -> Result<Seal, String> {
        let hash = blake3::Hash::from_hex(&self.blake3).map_err(|error| error.to_string())?;
        Ok(Seal { bytes: self.length_bytes, blake3: *hash.as_bytes() })
    }

    /// What was captured of configuration space, as in the contract.
    pub fn config_to_wire(&self) -> Result<Option<v1::ConfigSpaceCapture>, String> {
        let Some(config) = &self.config else { return Ok(None) };
        if config.command > u32::from(u16::MAX) || config.interrupt_vectors > 2048 {
            return Err("command has 16 bits and there are at most 2048 interrupt vectors".to_owned());
        }
        Ok(Some(v1::ConfigSpaceCapture {
            command: config.command,
            interrupt_kind: number_of(&config.interrupt_kind, v1::InterruptKind::from_str_name)?,
            interrupt_vectors: config.interrupt_vectors,
        }))
    }
}

impl Manifest {
    pub(super) fn from_wire(wire: &v1::CheckpointManifest) -> Result<Self, Problem> {
        let create_time = wire.create_time.as_ref().map(time_to_text).transpose();
        let disposition = name_of(wire.source_disposition, v1::SourceDisposition::as_str_name);
        Ok(Self {
            format_version: wire.format_version,
            operation: wire.operation.clone(),
            create_time: create_time.map_err(|text| problem("create_time", text))?,
            source_disposition: disposition.map_err(|text| problem("source_disposition", text))?,
            devices: wire
                .devices
                .iter()
                .enumerate()
                .map(|(index, device)| {
                    Device::from_wire(device)
                        .map_err(|(field, text)| problem(format!("devices[{index}].{field}"), text))
                })
                .collect::<Result<_, _>>()?,
        })
    }

    /// The same as a message. The agent checks the rest of it.
    pub fn to_wire(&self) -> Result<v1::CheckpointManifest, (String, String)> {
        let create_time = self.create_time.as_deref().map(text_to_time).transpose();
        let disposition = number_of(&self.source_disposition, v1::SourceDisposition::from_str_name);
        Ok(v1::CheckpointManifest {
            format_version: self.format_version,
            operation: self.operation.clone(),
            create_time: create_time.map_err(|text| problem("manifest.create_time", text))?,
            source_disposition: disposition.map_err(|text| problem("manifest.source_disposition", text))?,
            devices: self
                .devices
                .iter()
                .enumerate()
                .map(|(index, device)| {
                    device
                        .to_wire()
                        .map_err(|(field, text)| problem(format!("manifest.devices[{index}].{field}"), text))
                })
                .collect::<Result<_, _>>()?,
        })
    }
}

impl Device {
    fn from_wire(wire: &v1::DeviceManifest) -> Result<Self, (&'static str, String)> {
        let data_size = wire.data_size.as_ref().map(|size| {
            name_of(size.kind, v1::DataSizeKind::as_str_name).map(|kind| DataSize { kind, bytes: size.bytes })
        });
        Ok(Self {
            source_device: wire.source_device.clone(),
            source_address: wire.source_address.clone(),
            backend: name_of(wire.backend, v1::Backend::as_str_name).map_err(|text| ("backend", text))?,
            driver: wire.driver.clone(),
            fingerprint: wire
                .fingerprint
                .as_ref()
                .map(|print| print.facts.iter().map(|(name, value)| (name.clone(), value.clone())).collect()),
            logical_device: wire
                .logical_device
                .as_ref()
                .map(|logical| LogicalDevice { id: logical.id.clone(), epoch: logical.epoch }),
            data_size: data_size.transpose().map_err(|text| ("data_size.kind", text))?,
        })
    }

    fn to_wire(&self) -> Result<v1::DeviceManifest, (&'static str, String)> {
        let data_size = self.data_size.as_ref().map(|size| {
            number_of(&size.kind, v1::DataSizeKind::from_str_name)
                .map(|kind| v1::DataSize { kind, bytes: size.bytes })
        });
        Ok(v1::DeviceManifest {
            source_device: self.source_device.clone(),
            source_address: self.source_address.clone(),
            backend: number_of(&self.backend, v1::Backend::from_str_name)
                .map_err(|text| ("backend", text))?,
            driver: self.driver.clone(),
            fingerprint: self.fingerprint.as_ref().map(|facts| v1::Fingerprint {
                facts: facts.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
            }),
            logical_device: self
                .logical_device
                .as_ref()
                .map(|logical| v1::LogicalDevice { id: logical.id.clone(), epoch: logical.epoch }),
            data_size: data_size.transpose().map_err(|text| ("data_size.kind", text))?,
        })
    }
}

fn name_of<E: TryFrom<i32>>(number: i32, name: impl Fn(&E) -> &'static str) -> Result<String, String> {
    match E::try_from(number) {
        Ok(value) => Ok(name(&value).to_owned()),
        Err(_) => Err(format!("{number} is not a value that this program knows")),
    }
}

fn number_of<E: Into<i32>>(name: &str, value: impl Fn(&str) -> Option<E>) -> Result<i32, String> {
    match value(name) {
        Some(value) => Ok(value.into()),
        None => Err(format!(
            "{:?} is not a value that this program knows",
            name.chars().take(64).collect::<String>()
        )),
    }
}

fn time_to_text(time: &prost_types::Timestamp) -> Result<String, String> {
    let out_of_range = || "it is not a time between the years 1970 and 9999".to_owned();
    let seconds = u64::try_from(time.seconds).map_err(|_| out_of_range())?;
    let nanos =
        u32::try_from(time.nanos).ok().filter(|nanos| *nanos < 1_000_000_000).ok_or_else(out_of_range)?;
    // The last second of the year 9999: RFC 3339 has no later one.
    if seconds > 253_402_300_799 {
        return Err(out_of_range());
    }
    Ok(humantime::format_rfc3339_nanos(SystemTime::UNIX_EPOCH + Duration::new(seconds, nanos)).to_string())
}

fn text_to_time(text: &str) -> Result<prost_types::Timestamp, String> {
    let time = humantime::parse_rfc3339(text).map_err(|error| error.to_string())?;
    Ok(time.into())
}
