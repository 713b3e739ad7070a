//! What is said of saved state, as text: in `manifest.json` of a folder, and in the manifests of a store.
//!
//! ```text
//!   v1::CheckpointManifest <-> Manifest (serde)      v1::ConfigSpaceCapture <-> Config      Manifest + configs + who = About
//! ```
//!
//! Invariants: unknown fields are refused, and enum values stand by their names in the contract. Failure paths: each
//! refusal names the field.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use vfio_checkpoint_proto::v1;

/// What a checkpoint is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Consistency {
    /// The state of all devices at one moment, and they stayed stopped as long as the caller wanted.
    Consistent,
    /// It is not known that they did: memory that was captured along with it may have moved on.
    Inconsistent,
}

/// What an agent says of a checkpoint in a store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// The node of the agent, for people.
    pub node: String,
    /// Who saved it: the identity of the verified certificate.
    pub caller: String,
    /// The pod that used the devices; empty where it was not said.
    pub owner_pod: String,
    /// What it is.
    pub manifest: Manifest,
    /// What was captured of each device's configuration space, in the order of the set.
    pub config: Vec<Option<Config>>,
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
    pub(crate) devices: Vec<Device>,
}

#[allow(clippy::struct_field_names, reason = "the names are those of the contract")]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Device {
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
pub type Problem = (String, String);

pub(crate) fn problem(field: impl Into<String>, problem: impl Into<String>) -> Problem {
    (field.into(), problem.into())
}

impl Config {
    /// Out of the contract's message.
    pub fn from_wire(wire: &v1::ConfigSpaceCapture) -> Result<Self, String> {
        Ok(Self {
            command: wire.command,
            interrupt_kind: name_of(wire.interrupt_kind, v1::InterruptKind::as_str_name)?,
            interrupt_vectors: wire.interrupt_vectors,
        })
    }

    /// As in the contract.
    pub fn to_wire(&self) -> Result<v1::ConfigSpaceCapture, String> {
        if self.command > u32::from(u16::MAX) || self.interrupt_vectors > 2048 {
            return Err("command has 16 bits and there are at most 2048 interrupt vectors".to_owned());
        }
        Ok(v1::ConfigSpaceCapture {
            command: self.command,
            interrupt_kind: number_of(&self.interrupt_kind, v1::InterruptKind::from_str_name)?,
            interrupt_vectors: self.interrupt_vectors,
        })
    }
}

impl Manifest {
    /// Out of the contract's message.
    pub fn from_wire(wire: &v1::CheckpointManifest) -> Result<Self, Problem> {
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
    pub fn to_wire(&self) -> Result<v1::CheckpointManifest, Problem> {
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
