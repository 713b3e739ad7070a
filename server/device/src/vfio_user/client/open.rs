//! Connecting to a device process: the handshake, and what is asked once.
//!
//! ```text
//!   connect -> VERSION -> GET_INFO -> FEATURE get MIGRATION -> DATA_SIZE, DMA logging, configuration region, PCI ids
//! ```
//!
//! # Failure paths
//! [`ConnectError`]. What a server refuses of the optional part is absent; a connection lost on the way is an error.

use std::io;
use std::path::{Path, PathBuf};

use vfio_bindings::bindings::vfio as uapi;
use vfio_checkpoint_fsm::{Capabilities as MigrationFlags, CapabilitiesError};

use crate::vfio_user::codec::{
    Command, DEVICE_INFO_BYTES, DeviceInfo, FeatureId, FeatureOperation, FeaturePayload, REGION_INFO_BYTES,
    Reply,
};
use crate::vfio_user::connection::ConnectionError;
use crate::{Call, DeviceCapabilities, DeviceError, Fingerprint};

use super::config_space::{HEADER_BYTES, REGION, read_u16};
use super::link::Link;

/// Why a device process could not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// Nobody listens, or the socket is not for us.
    #[error("connecting to {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The process did not agree on a version. One that is in use already does not answer at all.
    #[error("agreeing on a version with the process behind {name}")]
    Handshake {
        /// The device's name.
        name: String,
        /// How it failed.
        #[source]
        source: ConnectionError,
    },
    /// The process did not say what device it is.
    #[error("asking what {name} is")]
    Probe {
        /// The device's name.
        name: String,
        /// How it failed.
        #[source]
        source: DeviceError,
    },
    /// The device has no migration.
    #[error("{name} cannot migrate: its process has no migration feature")]
    NotMigratable {
        /// The device's name.
        name: String,
        /// The refusal.
        #[source]
        source: io::Error,
    },
    /// Its migration flags are no set that migration v2 allows.
    #[error("{name} cannot migrate")]
    Flags {
        /// The device's name.
        name: String,
        /// What is wrong with them.
        #[source]
        source: CapabilitiesError,
    },
    /// What was kept is no connection to a device process. It was left alone.
    #[error("what was kept for {name} is no connected stream socket; it was not touched")]
    NotAConnection {
        /// The device's name.
        name: String,
    },
    /// A connection that another process had cannot be gone on with.
    #[error(
        "the process behind {name} does not go on in step where another owner of its connection was stopped: what its \
         device did is not known and its state counts as lost; the connection was closed, so that the process resets it"
    )]
    StateLost {
        /// The device's name.
        name: String,
        /// How the first exchange failed.
        #[source]
        source: DeviceError,
    },
}

/// What the process said of its device.
#[derive(Debug)]
pub(super) struct Probed {
    pub(super) info: DeviceInfo,
    pub(super) capabilities: DeviceCapabilities,
    pub(super) fingerprint: Fingerprint,
}

/// Name of a socket for people: its file name.
pub(super) fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Asks everything that is asked once.
pub(super) fn probe(link: &mut Link, name: &str) -> Result<Probed, ConnectError> {
    let failed = |source| ConnectError::Probe { name: name.to_owned(), source };
    let info = device_info(link).map_err(failed)?;
    let flags = link.get_feature(Call::Probe, FeatureId::Migration, |payload| match payload {
        FeaturePayload::Migration(flags) => Some(flags),
        FeaturePayload::Empty
        | FeaturePayload::State(_)
        | FeaturePayload::DataSize(_)
        | FeaturePayload::LogStart(_)
        | FeaturePayload::LogReport(_)
        | FeaturePayload::Opaque(_) => None,
    });
    let flags = match flags {
        Ok(flags) => flags,
        // Which errno is for the server to choose; a refusal is a refusal.
        Err(DeviceError::Os { source, .. }) => {
            return Err(ConnectError::NotMigratable { name: name.to_owned(), source });
        }
        Err(source) => return Err(failed(source)),
    };
    let migration = MigrationFlags::from_kernel_flags(flags)
        .map_err(|source| ConnectError::Flags { name: name.to_owned(), source })?;
    let optional = optional(link, info, migration).map_err(failed)?;
    let fingerprint = fingerprint(link, info, optional.config_space).map_err(failed)?;
    Ok(Probed { info, capabilities: optional, fingerprint })
}

pub(super) fn device_info(link: &mut Link) -> Result<DeviceInfo, DeviceError> {
    link.ask(Call::Probe, &Command::GetInfo { argsz: DEVICE_INFO_BYTES }, &[], |reply| {
        let Reply::Info(info) = reply else { return Err("it carries no device info") };
        Ok(info)
    })
}

fn optional(
    link: &mut Link,
    info: DeviceInfo,
    migration: MigrationFlags,
) -> Result<DeviceCapabilities, DeviceError> {
    let get = FeatureOperation::Probe { get: true, set: false };
    let set = FeatureOperation::Probe { get: false, set: true };
    Ok(DeviceCapabilities {
        migration,
        reset: info.flags & uapi::VFIO_DEVICE_FLAGS_RESET != 0,
        data_size: link.probe(FeatureId::MigDataSize, get)?,
        // The call that would tell of new initial data goes to a data fd, and there is none.
        precopy_reinit: false,
        dma_logging: link.probe(FeatureId::DmaLoggingStart, set)?
            && link.probe(FeatureId::DmaLoggingReport, get)?
            && link.probe(FeatureId::DmaLoggingStop, set)?,
        config_space: info.flags & uapi::VFIO_DEVICE_FLAGS_PCI != 0
            && info.regions > REGION
            && has_config_region(link)?,
    })
}

fn has_config_region(link: &mut Link) -> Result<bool, DeviceError> {
    let command = Command::GetRegionInfo { argsz: REGION_INFO_BYTES, index: REGION };
    let found = link.ask(Call::Probe, &command, &[], |reply| {
        let Reply::RegionInfo(info) = reply else { return Err("it carries no region info") };
        Ok(info.flags & uapi::VFIO_REGION_INFO_FLAG_READ != 0 && info.size_bytes >= HEADER_BYTES)
    });
    match found {
        Err(DeviceError::Os { .. }) => Ok(false),
        other => other,
    }
}

/// What is stable of a device process: what it says it is, not where it runs. For a PCI function its ids; how many
/// regions and kinds of interrupt it has in any case. Its page size, limits and socket are this connection's.
fn fingerprint(link: &mut Link, info: DeviceInfo, pci: bool) -> Result<Fingerprint, DeviceError> {
    let fingerprint = Fingerprint::new()
        .with("driver", super::DRIVER)
        .with("regions", info.regions.to_string())
        .with("irqs", info.irqs.to_string());
    if !pci {
        return Ok(fingerprint);
    }
    let mut word = |offset| read_u16(link, Call::Probe, offset);
    let (vendor, device) = (word(0x00)?, word(0x02)?);
    let (revision, _interface) = word(0x08)?.to_le_bytes().into();
    let (subsystem_vendor, subsystem_device) = (word(0x2c)?, word(0x2e)?);
    Ok(fingerprint
        .with("pci_device", format!("{vendor:04x}:{device:04x}"))
        .with("pci_subsystem", format!("{subsystem_vendor:04x}:{subsystem_device:04x}"))
        .with("pci_revision", format!("{revision:02x}")))
}
