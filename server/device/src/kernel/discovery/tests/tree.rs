//! Fake `/sys`, `/proc` and `/dev`, linked together the way the kernel links them.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::super::SysRoots;

/// A fake machine in a temporary folder.
pub(super) struct Tree {
    folder: tempfile::TempDir,
}

impl Tree {
    /// A machine with a PCI bus and nothing on it.
    pub(super) fn new() -> Self {
        let tree = Self { folder: tempfile::tempdir().unwrap() };
        for path in ["sys/bus/pci/devices", "sys/kernel/iommu_groups", "proc", "dev/vfio/devices"] {
            fs::create_dir_all(tree.path(path)).unwrap();
        }
        tree
    }

    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.folder.path().join(path)
    }

    pub(super) fn roots(&self) -> SysRoots {
        SysRoots { sys: self.path("sys"), proc: self.path("proc"), dev: self.path("dev") }
    }

    /// A PCI function with the IDs `vendor:device`, in no group and without a driver.
    pub(super) fn pci(&self, name: &str, ids: &str) -> Device {
        let folder = self.path("sys/devices/pci0000:00").join(name);
        fs::create_dir_all(&folder).unwrap();
        link(&folder, &self.path("sys/bus/pci/devices").join(name));
        let (vendor, device) = ids.split_once(':').unwrap();
        let device = Device { root: self.folder.path().into(), folder }
            .attribute("vendor", &format!("0x{vendor}\n"))
            .attribute("device", &format!("0x{device}\n"));
        device
            .attribute("subsystem_vendor", "0x15b3\n")
            .attribute("subsystem_device", "0x0058\n")
            .attribute("revision", "0x00\n")
            .attribute("class", "0x020000\n")
            .attribute("numa_node", "-1\n")
    }

    /// An mdev of type `mtty-2` on a parent without a NUMA node, in an emulated group.
    pub(super) fn mtty(&self, uuid: &str, group: u32) -> Device {
        let parent = self.path("sys/devices/virtual/mtty/mtty");
        let folder = parent.join(uuid);
        let kind = parent.join("mdev_supported_types/mtty-2");
        for path in [&folder, &kind, &self.path("sys/bus/mdev/devices")] {
            fs::create_dir_all(path).unwrap();
        }
        fs::write(kind.join("name"), "Dual port serial\n").unwrap();
        link(&folder, &self.path("sys/bus/mdev/devices").join(uuid));
        link(&kind, &folder.join("mdev_type"));
        let device = Device { root: self.folder.path().into(), folder }.driver("mtty").group(group);
        fs::write(self.path(&format!("sys/kernel/iommu_groups/{group}/name")), "vfio-noiommu\n").unwrap();
        device
    }

    /// A process that has these files open: pairs of the link's target and its fdinfo.
    pub(super) fn process(&self, pid: u32, comm: &str, files: &[(&str, &str)]) {
        let folder = self.path("proc").join(pid.to_string());
        for path in ["fd", "fdinfo"] {
            fs::create_dir_all(folder.join(path)).unwrap();
        }
        fs::write(folder.join("comm"), format!("{comm}\n")).unwrap();
        for (number, (target, info)) in files.iter().enumerate() {
            symlink(target, folder.join("fd").join(number.to_string())).unwrap();
            fs::write(folder.join("fdinfo").join(number.to_string()), format!("pos:\t0\n{info}\n")).unwrap();
        }
    }

    /// A node in `/dev`, as far as existence goes.
    pub(super) fn node(&self, path: &str) {
        fs::write(self.path("dev").join(path), "").unwrap();
    }
}

/// A device of a fake machine, being furnished.
pub(super) struct Device {
    root: PathBuf,
    pub(super) folder: PathBuf,
}

impl Device {
    pub(super) fn attribute(self, name: &str, content: &str) -> Self {
        fs::write(self.folder.join(name), content).unwrap();
        self
    }

    pub(super) fn link(self, name: &str, target: &str) -> Self {
        symlink(target, self.folder.join(name)).unwrap();
        self
    }

    pub(super) fn driver(self, driver: &str) -> Self {
        self.link("driver", &format!("../../../bus/pci/drivers/{driver}"))
    }

    pub(super) fn physfn(self, parent: &str) -> Self {
        self.link("physfn", &format!("../{parent}"))
    }

    /// Registered with VFIO as `vfioN`.
    pub(super) fn cdev(self, name: &str) -> Self {
        fs::create_dir_all(self.folder.join("vfio-dev").join(name)).unwrap();
        self
    }

    pub(super) fn group(self, id: u32) -> Self {
        let group = self.root.join(format!("sys/kernel/iommu_groups/{id}"));
        fs::create_dir_all(group.join("devices")).unwrap();
        link(&group, &self.folder.join("iommu_group"));
        link(&self.folder, &group.join("devices").join(self.folder.file_name().unwrap()));
        self
    }
}

fn link(target: &Path, at: &Path) {
    symlink(target, at).unwrap();
}
