//! Which devices this node has that could be checkpointed, without opening any of them.
//!
//! ```text
//!   sys/bus/pci/devices/*  --of interest?--.                     .- driver, ids, parent, NUMA node
//!   sys/bus/mdev/devices/* ----------------+--> Discovered ------+- IOMMU group and its viability
//!   proc/*/fd/* (one pass) ----------------'                     +- CANDIDATE | NO | UNKNOWN, with the reason
//!                                                                +- who holds it
//!                                                                '- notes: what could not be found out
//! ```
//!
//! Opening a VFIO device resets it and takes it from everybody else, so this module never does; what only an open
//! device can tell (whether it migrates, how large its state is) is told by the backend that owns it. Read in this
//! order: [`Discovered`], then `drivers` (which drivers migrate), `group` (viability), `holders`.
//!
//! # What is listed
//! Every mdev. Of the PCI functions: those that a VFIO driver is bound to, every virtual function whatever its
//! driver (it is what somebody would bind next), and what shares a group with a VFIO device, because it decides
//! whether that one can be used; of these, bridges appear as [`Member`]s of the group only. Other functions of the
//! host are left out, but [`find`] answers for any. Devices of the other VFIO buses (platform, AMBA, fsl-mc, CDX) are
//! left out: no driver there implements migration.
//!
//! # Invariants
//! - Nothing is opened but regular files in sysfs and `/proc`, and of each at most 4 KiB are read.
//! - No path is built from anything but a parsed [`DeviceName`], a number, or one checked path component.
//! - Nothing is cached: an answer is as old as the call, and may be outdated when it is read.
//!
//! # Failure paths
//! A bus that does not exist has no devices; one that cannot be listed is a [`DiscoveryError`]. Trouble with one
//! device is a [`Note`] on it and leaves the others alone; a device that is removed meanwhile is left out.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Serialize;

mod attr;
mod blocker;
mod device;
mod drivers;
mod group;
mod holders;
mod name;
#[cfg(test)]
mod tests;

pub use attr::{Note, Problem};
pub use blocker::Blocker;
pub use device::{Discovered, MdevType, PciIds};
pub use drivers::{Migratable, Reason, Verdict};
pub use group::{Group, GroupKind, Member, Role, UnknownViability, Viability};
pub use holders::{Coverage, Evidence, Holder, Holders, Process};
pub use name::{Bus, DeviceName, InvalidName, MdevUuid, PciAddress};

use attr::{Folder, entries};

/// How many devices of one bus are looked at.
const MAX_DEVICES: usize = 1 << 16;

/// Where the kernel shows itself. Tests point these at trees of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SysRoots {
    /// sysfs.
    pub sys: PathBuf,
    /// procfs, of the PID namespace in which holders are looked for.
    pub proc: PathBuf,
    /// The folder of device nodes, in which only existence is looked at.
    pub dev: PathBuf,
}

impl Default for SysRoots {
    fn default() -> Self {
        Self { sys: "/sys".into(), proc: "/proc".into(), dev: "/dev".into() }
    }
}

impl SysRoots {
    fn bus_devices(&self, bus: Bus) -> PathBuf {
        self.sys.join("bus").join(bus.name()).join("devices")
    }

    fn vfio_dir(&self) -> PathBuf {
        self.dev.join("vfio")
    }
}

/// A device node, by its path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Node {
    /// Where it is, or would be.
    pub path: PathBuf,
    /// Whether it is there. sysfs can name a node that the kernel never made: a cdev without cdev support.
    pub exists: bool,
}

impl Node {
    fn at(path: PathBuf, folder: &mut Folder) -> Self {
        let exists = folder.exists(&path);
        Self { path, exists }
    }

    fn name(&self) -> Option<&str> {
        self.path.file_name().and_then(attr::plain_name)
    }
}

/// Why nothing can be said about the devices of this node, or about the one asked for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiscoveryError {
    /// sysfs is not where it should be.
    #[error("{} cannot be read: is sysfs mounted?", path.display())]
    NoSysfs {
        /// Where it should be.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
    /// The devices of a bus cannot be listed.
    #[error("the devices in {} cannot be listed", path.display())]
    Unlistable {
        /// The bus's folder.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
    /// The text is not a device's name.
    #[error(transparent)]
    InvalidName(#[from] InvalidName),
    /// This node has no such device.
    #[error("there is no {bus} device {name} on this node", bus = name.bus())]
    NotFound {
        /// What was asked for.
        name: DeviceName,
    },
}

/// Every device of interest on this node: PCI functions first, each bus in the order of its names.
pub fn discover(roots: &SysRoots) -> Result<Vec<Discovered>, DiscoveryError> {
    require_sysfs(&roots.sys)?;
    let pci = list::<PciAddress>(roots, Bus::Pci)?.into_iter().map(DeviceName::Pci);
    let mdevs = list::<MdevUuid>(roots, Bus::Mdev)?.into_iter().map(DeviceName::Mdev);
    let scan = holders::scan(&roots.proc);
    Ok(pci
        .chain(mdevs)
        .filter_map(|name| device::inspect(roots, name, &scan))
        .filter(Discovered::is_of_interest)
        .collect())
}

/// One device, by its PCI address or its mdev's UUID, whether or not it is of interest.
pub fn find(roots: &SysRoots, name: &str) -> Result<Discovered, DiscoveryError> {
    let name = name.parse()?;
    require_sysfs(&roots.sys)?;
    let scan = holders::scan(&roots.proc);
    device::inspect(roots, name, &scan).ok_or(DiscoveryError::NotFound { name })
}

fn require_sysfs(sys: &Path) -> Result<(), DiscoveryError> {
    match fs::read_dir(sys) {
        Ok(_) => Ok(()),
        Err(source) => Err(DiscoveryError::NoSysfs { path: sys.to_owned(), source }),
    }
}

fn list<T: FromStr + Ord>(roots: &SysRoots, bus: Bus) -> Result<Vec<T>, DiscoveryError> {
    let path = roots.bus_devices(bus);
    let (names, complete) = match entries(&path, MAX_DEVICES) {
        Ok(listing) => listing,
        Err(source) => return Err(DiscoveryError::Unlistable { path, source }),
    };
    if !complete {
        tracing::warn!(%bus, limit = MAX_DEVICES, "there are more devices than are looked at");
    }
    // What does not parse is no device of this bus, and no path is built from it.
    let mut names: Vec<T> = names.iter().filter_map(|name| name.parse().ok()).collect();
    names.sort_unstable();
    Ok(names)
}
