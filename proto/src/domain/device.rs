//! What is said of a device in a manifest: what served it, how much state it has, what must match, whose state it is.

use std::collections::BTreeMap;

use super::{Invalid, checks};
use crate::ids::{Epoch, LogicalDeviceId};
use crate::v1;

/// What serves a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backend {
    /// A kernel VFIO device.
    Kernel,
    /// A device in another process.
    VfioUser,
    /// A simulated device.
    Sim,
}

impl Backend {
    pub(super) fn from_wire(field: &str, number: i32) -> Result<Self, Invalid> {
        match checks::known(field, number)? {
            v1::Backend::Unspecified => Err(Invalid::new(field, "it must be given")),
            v1::Backend::Kernel => Ok(Self::Kernel),
            v1::Backend::VfioUser => Ok(Self::VfioUser),
            v1::Backend::Sim => Ok(Self::Sim),
        }
    }
}

impl From<Backend> for v1::Backend {
    fn from(backend: Backend) -> Self {
        match backend {
            Backend::Kernel => Self::Kernel,
            Backend::VfioUser => Self::VfioUser,
            Backend::Sim => Self::Sim,
        }
    }
}

/// An amount of device state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DataSize {
    /// Exactly this many bytes.
    Known(u64),
    /// No more bytes than this.
    UpperBound(u64),
    /// The device does not say.
    Unknown,
}

impl TryFrom<v1::DataSize> for DataSize {
    type Error = Invalid;

    fn try_from(wire: v1::DataSize) -> Result<Self, Invalid> {
        match checks::known("kind", wire.kind)? {
            v1::DataSizeKind::Known => Ok(Self::Known(wire.bytes)),
            v1::DataSizeKind::UpperBound => Ok(Self::UpperBound(wire.bytes)),
            v1::DataSizeKind::Unspecified | v1::DataSizeKind::Unknown if wire.bytes == 0 => Ok(Self::Unknown),
            v1::DataSizeKind::Unspecified | v1::DataSizeKind::Unknown => Err(Invalid::new(
                "bytes",
                format!("it is {}, but the kind says that the size is unknown", wire.bytes),
            )),
        }
    }
}

impl From<DataSize> for v1::DataSize {
    fn from(size: DataSize) -> Self {
        let (kind, bytes) = match size {
            DataSize::Known(bytes) => (v1::DataSizeKind::Known, bytes),
            DataSize::UpperBound(bytes) => (v1::DataSizeKind::UpperBound, bytes),
            DataSize::Unknown => (v1::DataSizeKind::Unknown, 0),
        };
        Self { kind: kind.into(), bytes }
    }
}

/// What must match on the device that a state goes to: facts by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fingerprint {
    facts: BTreeMap<String, String>,
}

impl Fingerprint {
    /// The most facts.
    pub const MAX_FACTS: usize = 64;
    /// The longest name of a fact.
    pub const MAX_NAME_BYTES: usize = 64;
    /// The longest value of a fact.
    pub const MAX_VALUE_BYTES: usize = 1024;

    /// The facts, by name.
    pub fn facts(&self) -> &BTreeMap<String, String> {
        &self.facts
    }
}

impl TryFrom<BTreeMap<String, String>> for Fingerprint {
    type Error = Invalid;

    fn try_from(facts: BTreeMap<String, String>) -> Result<Self, Invalid> {
        if facts.len() > Self::MAX_FACTS {
            let problem =
                format!("it has {} entries, and at most {} are allowed", facts.len(), Self::MAX_FACTS);
            return Err(Invalid::new("facts", problem));
        }
        let facts = facts
            .into_iter()
            .map(|(name, value)| {
                let name = checks::text("facts (a name)", name, 1, Self::MAX_NAME_BYTES)?;
                let value = checks::text(&format!("facts[{name:?}]"), value, 0, Self::MAX_VALUE_BYTES)?;
                Ok((name, value))
            })
            .collect::<Result<_, Invalid>>()?;
        Ok(Self { facts })
    }
}

impl TryFrom<v1::Fingerprint> for Fingerprint {
    type Error = Invalid;

    fn try_from(wire: v1::Fingerprint) -> Result<Self, Invalid> {
        wire.facts.try_into()
    }
}

impl From<Fingerprint> for v1::Fingerprint {
    fn from(fingerprint: Fingerprint) -> Self {
        Self { facts: fingerprint.facts }
    }
}

/// The state that lives in a device and moves.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LogicalDevice {
    /// Stable across nodes.
    pub id: LogicalDeviceId,
    /// Rises with each take-over.
    pub epoch: Epoch,
}

impl TryFrom<v1::LogicalDevice> for LogicalDevice {
    type Error = Invalid;

    fn try_from(wire: v1::LogicalDevice) -> Result<Self, Invalid> {
        Ok(Self { id: checks::id("id", &wire.id)?, epoch: Epoch(wire.epoch) })
    }
}

impl From<LogicalDevice> for v1::LogicalDevice {
    fn from(logical: LogicalDevice) -> Self {
        Self { id: logical.id.into(), epoch: logical.epoch.0 }
    }
}
