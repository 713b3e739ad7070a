//! Who a discovered device is, and what must match for its state to load elsewhere.
//!
//! ```text
//!   Discovered --identity--> Identity        --fingerprint--> driver, and
//!                                                PCI:  pci_device, pci_subsystem, pci_revision
//!                                                mdev: mdev_type
//! ```
//!
//! # Invariants
//! - A fact that sysfs does not show is not stated, rather than guessed. Firmware is never shown there; drivers
//!   check it themselves when a state is loaded (see [`Quirk::NeedsSameFirmware`](super::quirks::Quirk)).
//!
//! # Failure paths
//! None; pure functions. A fact that is missing on one side makes the two sides differ, which is a refusal.

use super::discovery::Discovered;
use crate::{Backend, Fingerprint, Identity};

/// Which device this is. `None` while no driver is bound: a device is its slot and what serves it.
pub fn identity(device: &Discovered) -> Option<Identity> {
    let driver = device.driver.clone()?;
    Some(Identity { name: device.name.to_string(), backend: Backend::Kernel, driver })
}

/// What must match on another device for this one's state to load there, as far as sysfs shows it.
pub fn fingerprint(device: &Discovered) -> Fingerprint {
    let mut fingerprint = Fingerprint::new();
    if let Some(driver) = &device.driver {
        fingerprint = fingerprint.with("driver", driver.as_str());
    }
    if let Some(ids) = &device.ids {
        fingerprint = fingerprint.with("pci_device", format!("{:04x}:{:04x}", ids.vendor, ids.device));
        if let (Some(vendor), Some(device)) = (ids.subsystem_vendor, ids.subsystem_device) {
            fingerprint = fingerprint.with("pci_subsystem", format!("{vendor:04x}:{device:04x}"));
        }
        if let Some(revision) = ids.revision {
            fingerprint = fingerprint.with("pci_revision", format!("{revision:02x}"));
        }
    }
    if let Some(mdev_type) = &device.mdev_type {
        fingerprint = fingerprint.with("mdev_type", mdev_type.id.as_str());
    }
    fingerprint
}

/// A made-up sysfs and `/dev` for tests, here and in `open.rs`.
#[cfg(test)]
pub(super) mod fake {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::{Path, PathBuf};

    use crate::kernel::discovery::{Discovered, SysRoots, find};

    pub(in super::super) const PCI: &str = "0000:03:00.0";
    pub(in super::super) const MDEV: &str = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";

    pub(in super::super) struct Tree {
        root: tempfile::TempDir,
    }

    impl Tree {
        pub(in super::super) fn new() -> Self {
            let tree = Self { root: tempfile::tempdir().unwrap() };
            for folder in ["sys/bus/pci/devices", "sys/bus/mdev/devices", "dev/vfio/devices"] {
                fs::create_dir_all(tree.root.path().join(folder)).unwrap();
            }
            tree
        }

        pub(in super::super) fn roots(&self) -> SysRoots {
            let at = |folder: &str| self.root.path().join(folder);
            SysRoots { sys: at("sys"), proc: at("proc"), dev: at("dev") }
        }

        pub(in super::super) fn find(&self, name: &str) -> Discovered {
            find(&self.roots(), name).unwrap()
        }

        pub(in super::super) fn function(&self, address: &str, driver: Option<&str>) -> PathBuf {
            let path = self.device("pci", address, driver);
            for (attribute, value) in [
                ("vendor", "0x8086\n"),
                ("device", "0x10d3\n"),
                ("subsystem_vendor", "0x8086\n"),
                ("subsystem_device", "0x00a1\n"),
                ("revision", "0x02\n"),
            ] {
                fs::write(path.join(attribute), value).unwrap();
            }
            path
        }

        pub(in super::super) fn mdev(&self, uuid: &str, kind: &str) -> PathBuf {
            let path = self.device("mdev", uuid, Some("mtty"));
            let types = self.roots().sys.join("class/mdev_bus/mtty/mdev_supported_types").join(kind);
            fs::create_dir_all(&types).unwrap();
            symlink(&types, path.join("mdev_type")).unwrap();
            path
        }

        fn device(&self, bus: &str, name: &str, driver: Option<&str>) -> PathBuf {
            let bus = self.roots().sys.join("bus").join(bus);
            let path = bus.join("devices").join(name);
            fs::create_dir(&path).unwrap();
            if let Some(driver) = driver {
                let folder = bus.join("drivers").join(driver);
                fs::create_dir_all(&folder).unwrap();
                symlink(&folder, path.join("driver")).unwrap();
            }
            path
        }

        pub(in super::super) fn group(&self, number: u32, members: &[&Path]) {
            let group = self.roots().sys.join("kernel/iommu_groups").join(number.to_string());
            fs::create_dir_all(group.join("devices")).unwrap();
            for member in members {
                symlink(&group, member.join("iommu_group")).unwrap();
                symlink(member, group.join("devices").join(member.file_name().unwrap())).unwrap();
            }
        }

        pub(in super::super) fn node(&self, path: &str) -> PathBuf {
            let node = self.roots().dev.join(path);
            fs::write(&node, "").unwrap();
            node
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::fake::{MDEV, PCI, Tree};
    use super::*;

    #[test]
    fn a_function_is_told_by_its_ids() {
        let tree = Tree::new();
        tree.function(PCI, Some("vfio-pci"));
        let device = tree.find(PCI);
        assert_eq!(identity(&device).unwrap().to_string(), "0000:03:00.0 (kernel, vfio-pci)");
        assert_eq!(
            fingerprint(&device).to_string(),
            "driver=vfio-pci pci_device=8086:10d3 pci_revision=02 pci_subsystem=8086:00a1"
        );
    }

    #[test]
    fn an_mdev_is_told_by_its_type() {
        let tree = Tree::new();
        tree.mdev(MDEV, "mtty-2");
        assert_eq!(fingerprint(&tree.find(MDEV)).to_string(), "driver=mtty mdev_type=mtty-2");
    }

    #[test]
    fn what_sysfs_does_not_show_is_not_stated() {
        let tree = Tree::new();
        let path = tree.function(PCI, None);
        fs::remove_file(path.join("subsystem_device")).unwrap();
        fs::remove_file(path.join("revision")).unwrap();
        let device = tree.find(PCI);
        assert_eq!(identity(&device), None);
        assert_eq!(fingerprint(&device).to_string(), "pci_device=8086:10d3");
    }
}
