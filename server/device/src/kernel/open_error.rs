//! Why a device could not be opened, or not be used for migration once it was.
//!
//! Each variant says what is wrong, where, and what to do about it; the errno or the layer below is its source.

use std::io;
use std::path::PathBuf;

use vfio_checkpoint_fsm::CapabilitiesError;
use vfio_ioctls::VfioError;

use super::discovery::{DiscoveryError, Member, Process};
use super::fds::{KernelFds, KernelPath};

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The name is no device's, this node has no such device, or sysfs cannot be read.
    #[error(transparent)]
    Discovery(#[from] DiscoveryError),
    /// The device is there, but no VFIO driver has it.
    #[error(
        "{name} is bound to {}; bind it to its VFIO driver (driver_override, then drivers_probe)",
        driver.as_deref().unwrap_or("no driver")
    )]
    NotBoundToVfio {
        /// The device.
        name: String,
        /// The driver that has it, if one has.
        driver: Option<String>,
    },
    /// No IOMMU confines the device's DMA: it is in no group, or in one of the kernel's unsafe no-IOMMU mode.
    #[error(
        "no IOMMU confines the DMA of {name}; enable it in the firmware and on the kernel's command line"
    )]
    NoIommu {
        /// The device.
        name: String,
    },
    /// A device node that the chosen path needs is missing.
    #[error(
        "the {path} path to {name} needs {}, which is not there; load the VFIO modules, give this process the node, \
         or choose the other path",
        node.display()
    )]
    NoNode {
        /// The device.
        name: String,
        /// The path that needs the node.
        path: KernelPath,
        /// The missing node.
        node: PathBuf,
    },
    /// A device node may not be opened.
    #[error("may not open {}; give this process read and write access to it", node.display())]
    Permission {
        /// The node.
        node: PathBuf,
        /// EACCES or EPERM.
        #[source]
        source: io::Error,
    },
    /// Somebody has the device, or another device of its group, open.
    #[error("{name} is in use: {} is taken, {}; have it closed or handed over", node.display(), holders(by))]
    InUse {
        /// The device.
        name: String,
        /// The node that is taken.
        node: PathBuf,
        /// Who was seen to hold it just before, or else to hold some VFIO device that could be this one. May be
        /// empty: not every process can be looked at.
        by: Vec<Process>,
        /// EBUSY from the group or the binding, or EINVAL from the binding.
        #[source]
        source: io::Error,
    },
    /// A member of the device's IOMMU group is bound to a driver that does DMA for the kernel.
    #[error(
        "IOMMU group {group} of {name} is not viable: {}; bind every device of the group to a VFIO driver, or to none",
        list(blockers)
    )]
    GroupNotViable {
        /// The device.
        name: String,
        /// The group's number.
        group: u32,
        /// The members whose drivers block it. Empty where the last one let go in the meantime.
        blockers: Vec<Member>,
    },
    /// The device was opened and cannot migrate.
    #[error("{name} cannot migrate")]
    NotMigratable {
        /// The device.
        name: String,
        /// Why not.
        #[source]
        source: NotMigratable,
    },
    /// A step on the container path failed that has no name of its own here.
    #[error("opening {name} through its group failed")]
    Group {
        /// The device.
        name: String,
        /// What vfio-ioctls says.
        #[source]
        source: VfioError,
    },
    /// A step failed that has no name of its own here.
    #[error("{doing} failed for {name}")]
    Os {
        /// The device.
        name: String,
        /// The step.
        doing: &'static str,
        /// The errno.
        #[source]
        source: io::Error,
    },
}

/// Why an opened VFIO device cannot migrate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NotMigratable {
    /// The driver has no migration. Normal for plain `vfio-pci`.
    #[error("{driver} does not support migration for this device; a variant driver of its vendor may")]
    Absent {
        /// The driver.
        driver: String,
        /// ENOTTY or EINVAL.
        #[source]
        source: io::Error,
    },
    /// The driver could not say.
    #[error("asking {driver} for migration support failed")]
    Probe {
        /// The driver.
        driver: String,
        /// The errno.
        #[source]
        source: io::Error,
    },
    /// The driver says something that migration v2 does not allow.
    #[error("{driver} reports unusable migration flags")]
    Flags {
        /// The driver.
        driver: String,
        /// What is wrong with them.
        #[source]
        source: CapabilitiesError,
    },
}

/// Fds that could not be adopted, and why.
///
/// The fds come back, because dropping them might close the last duplicate, and that resets the device.
#[derive(Debug, thiserror::Error)]
#[error("cannot adopt the device")]
pub struct AdoptError {
    /// What was given, untouched.
    pub fds: KernelFds,
    /// Why not.
    #[source]
    pub source: OpenError,
}

fn list(members: &[Member]) -> String {
    if members.is_empty() {
        return "another member's driver held its DMA".to_owned();
    }
    let members: Vec<String> = members.iter().map(ToString::to_string).collect();
    format!("{} in the way", members.join(", "))
}

fn holders(by: &[Process]) -> String {
    if by.is_empty() {
        return "by a process that cannot be seen from here".to_owned();
    }
    let named: Vec<String> = by
        .iter()
        .map(|process| format!("{} (pid {})", process.comm.as_deref().unwrap_or("unknown"), process.pid))
        .collect();
    format!("as far as can be seen by {}", named.join(", "))
}
