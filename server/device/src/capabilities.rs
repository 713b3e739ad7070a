//! What a device can do, as data.
//!
//! Probed once when the device is opened, by asking the device, and never guessed from a name. A backend that
//! lacks a feature says so here; there is no method that pretends.

use std::fmt;

use serde::{Deserialize, Serialize};
use vfio_checkpoint_fsm::Capabilities;

/// The features of one opened device.
#[allow(clippy::struct_excessive_bools, reason = "independent features, each there or not")]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceCapabilities {
    /// The migration flags: which states the device has.
    pub migration: Capabilities,
    /// Whether `VFIO_DEVICE_RESET` works. Without it a failed restore leaves the device quarantined.
    pub reset: bool,
    /// Whether the device reports the size of its state (`MIG_DATA_SIZE`).
    pub data_size: bool,
    /// Whether the device opted in to `PRECOPY_INFO_REINIT` (feature 12): initial bytes may rise again.
    pub precopy_reinit: bool,
    /// Whether the device logs the pages it writes by DMA.
    pub dma_logging: bool,
    /// Whether the device has a PCI configuration space.
    pub config_space: bool,
}

impl fmt::Display for DeviceCapabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.migration)?;
        for (has, name) in [
            (self.reset, "RESET"),
            (self.data_size, "DATA_SIZE"),
            (self.precopy_reinit, "PRECOPY_REINIT"),
            (self.dma_logging, "DMA_LOGGING"),
            (self.config_space, "PCI_CONFIG"),
        ] {
            if has {
                write!(f, "|{name}")?;
            }
        }
        Ok(())
    }
}

/// How many bytes a stop-copy would take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataSize {
    /// Exactly this many bytes.
    Known(u64),
    /// At most this many: an estimate of the device, or the full size while pre-copy shrinks what is left.
    UpperBound(u64),
    /// The device does not say. Meets no limit unless the caller allows it.
    Unknown,
}

impl DataSize {
    /// The number, where there is one.
    pub fn bytes(self) -> Option<u64> {
        match self {
            Self::Known(bytes) | Self::UpperBound(bytes) => Some(bytes),
            Self::Unknown => None,
        }
    }
}

impl fmt::Display for DataSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(bytes) => write!(f, "{bytes} bytes"),
            Self::UpperBound(bytes) => write!(f, "at most {bytes} bytes"),
            Self::Unknown => f.write_str("unknown"),
        }
    }
}

/// What is left to pre-copy (`VFIO_MIG_GET_PRECOPY_INFO`). Estimates, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PrecopyInfo {
    /// Must be transferred before a stop-copy can be short. Only falls, unless `reinit`.
    pub initial_bytes: u64,
    /// State that changed since it was handed out.
    pub dirty_bytes: u64,
    /// There is new initial data and `initial_bytes` may have risen. Only from devices with
    /// [`DeviceCapabilities::precopy_reinit`].
    pub reinit: bool,
}
