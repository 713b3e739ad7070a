//! What a set of saved states is.

use std::collections::BTreeSet;
use std::time::SystemTime;

use prost::Message as _;

use super::{Backend, DataSize, Fingerprint, Invalid, LogicalDevice, checks};
use crate::ids::{DeviceName, OperationName};
use crate::{MAX_MANIFEST_BYTES, v1};

/// What becomes of the devices that were saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SourceDisposition {
    /// They run on, so the state has a running original.
    RunsOn,
    /// They stay stopped.
    StaysStopped,
}

impl From<SourceDisposition> for v1::SourceDisposition {
    fn from(disposition: SourceDisposition) -> Self {
        match disposition {
            SourceDisposition::RunsOn => Self::RunsOn,
            SourceDisposition::StaysStopped => Self::StaysStopped,
        }
    }
}

/// What a set of saved states is: 1 to [`MAX_DEVICES`](crate::MAX_DEVICES) devices, of different logical devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The save that it comes from.
    pub operation: OperationName,
    /// When the save was started.
    pub create_time: SystemTime,
    /// The devices, in the order of the set.
    pub devices: Vec<DeviceManifest>,
    /// What becomes of the source.
    pub source_disposition: SourceDisposition,
}

impl Manifest {
    /// The version of a manifest's meaning that this build reads and writes.
    pub const FORMAT_VERSION: u32 = 1;
}

impl TryFrom<v1::CheckpointManifest> for Manifest {
    type Error = Invalid;

    fn try_from(wire: v1::CheckpointManifest) -> Result<Self, Invalid> {
        if wire.format_version != Self::FORMAT_VERSION {
            let problem = format!(
                "it is {}, and this version reads {}; use a version that reads it",
                wire.format_version,
                Self::FORMAT_VERSION
            );
            return Err(Invalid::new("format_version", problem));
        }
        checks::set_size("devices", wire.devices.len())?;
        let encoded_bytes = wire.encoded_len();
        if encoded_bytes > MAX_MANIFEST_BYTES {
            let problem = format!(
                "the manifest has {encoded_bytes} bytes, and at most {MAX_MANIFEST_BYTES} are allowed"
            );
            return Err(Invalid::new("devices", problem));
        }
        let source_disposition = match checks::known("source_disposition", wire.source_disposition)? {
            // The careful reading: a running original must not get a second copy unasked.
            v1::SourceDisposition::Unspecified | v1::SourceDisposition::RunsOn => SourceDisposition::RunsOn,
            v1::SourceDisposition::StaysStopped => SourceDisposition::StaysStopped,
        };
        let mut logical = BTreeSet::new();
        let mut devices = Vec::with_capacity(wire.devices.len());
        for (index, device) in wire.devices.into_iter().enumerate() {
            let at = format!("devices[{index}]");
            let device = DeviceManifest::try_from(device).map_err(|invalid| invalid.within(&at))?;
            if !logical.insert(device.logical_device.id.clone()) {
                let problem = format!("{} is there twice; one set holds it once", device.logical_device.id);
                return Err(Invalid::new(format!("{at}.logical_device.id"), problem));
            }
            devices.push(device);
        }
        Ok(Self {
            operation: checks::id("operation", &wire.operation)?,
            create_time: checks::time("create_time", checks::present("create_time", wire.create_time)?)?,
            devices,
            source_disposition,
        })
    }
}

impl From<Manifest> for v1::CheckpointManifest {
    fn from(manifest: Manifest) -> Self {
        Self {
            format_version: Manifest::FORMAT_VERSION,
            operation: manifest.operation.into(),
            create_time: Some(manifest.create_time.into()),
            devices: manifest.devices.into_iter().map(Into::into).collect(),
            source_disposition: v1::SourceDisposition::from(manifest.source_disposition).into(),
        }
    }
}

/// What one saved state is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceManifest {
    /// Where it came from, for people.
    pub source_device: DeviceName,
    /// The address of the device that it came from, for people.
    pub source_address: String,
    /// What served it.
    pub backend: Backend,
    /// The driver behind it.
    pub driver: String,
    /// What must match on the device that the state goes to.
    pub fingerprint: Fingerprint,
    /// The logical device that it is the state of.
    pub logical_device: LogicalDevice,
    /// How much state there is.
    pub data_size: DataSize,
}

impl DeviceManifest {
    /// The longest `source_address`.
    pub const MAX_ADDRESS_BYTES: usize = 1024;
    /// The longest `driver`.
    pub const MAX_DRIVER_BYTES: usize = 64;
}

impl TryFrom<v1::DeviceManifest> for DeviceManifest {
    type Error = Invalid;

    fn try_from(wire: v1::DeviceManifest) -> Result<Self, Invalid> {
        let fingerprint = checks::present("fingerprint", wire.fingerprint)?;
        let logical_device = checks::present("logical_device", wire.logical_device)?;
        Ok(Self {
            source_device: checks::id("source_device", &wire.source_device)?,
            source_address: checks::text("source_address", wire.source_address, 0, Self::MAX_ADDRESS_BYTES)?,
            backend: Backend::from_wire("backend", wire.backend)?,
            driver: checks::text("driver", wire.driver, 1, Self::MAX_DRIVER_BYTES)?,
            fingerprint: fingerprint.try_into().map_err(|e: Invalid| e.within("fingerprint"))?,
            logical_device: logical_device.try_into().map_err(|e: Invalid| e.within("logical_device"))?,
            data_size: match wire.data_size {
                Some(size) => size.try_into().map_err(|e: Invalid| e.within("data_size"))?,
                None => DataSize::Unknown,
            },
        })
    }
}

impl From<DeviceManifest> for v1::DeviceManifest {
    fn from(device: DeviceManifest) -> Self {
        Self {
            source_device: device.source_device.into(),
            source_address: device.source_address,
            backend: v1::Backend::from(device.backend).into(),
            driver: device.driver,
            fingerprint: Some(device.fingerprint.into()),
            logical_device: Some(device.logical_device.into()),
            data_size: Some(device.data_size.into()),
        }
    }
}
