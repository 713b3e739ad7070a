//! Opening a device, on either path.
//!
//! ```text
//!   sysfs: found? bound to VFIO? in a group?  --no--> a named refusal, nothing opened
//!        |
//!        +-- iommufd:   open vfioN, open /dev/iommu, allocate an IOAS, BIND, ATTACH     (own ioctls)
//!        +-- container: /dev/vfio/vfio, /dev/vfio/GROUP, device fd                      (vfio-ioctls)
//!        |                  then duplicate device and container fd, and drop vfio-ioctls' values
//!        v
//!    KernelFds
//! ```
//!
//! # Opening resets
//! vfio-pci resets a function when it is first opened, and again on its last close. Open only what is configured as
//! the agent's own.
//!
//! # Why the container path can let go of vfio-ioctls' values
//! Dropping its `VfioDevice` closes its own device fd and asks for `UNSET_CONTAINER`. With this module's duplicate
//! open, the kernel answers EBUSY and changes nothing (`vfio_group_ioctl_unset_container`: the open device is a
//! user of the container). The group's file is then closed here but lives on, because every open device holds a
//! reference on it (`vfio_group_use_container`), and through it on the container. vfio-ioctls logs that EBUSY as
//! two lines at error level, target `vfio_ioctls`; they mean nothing.
//!
//! That drop also reads the device's `iommu_group` link again and panics where it is gone. So the device is named by
//! its own folder and not by its entry on the bus, which goes as soon as a removal begins: the folder's link stays
//! for as long as a duplicate is open, because the removal waits for the last close. Where there is no duplicate,
//! because duplicating failed, the panic is caught.
//!
//! # Failure paths
//! Whatever was opened before a step failed is closed again. A kernel that refuses with an errno of several
//! meanings (EINVAL from BIND, "set container failed") is explained by what sysfs shows of the group.

use std::fs::{File, OpenOptions as FileOptions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use iommufd_bindings::iommufd::iommu_ioas_alloc;
use iommufd_ioctls::IommuFd;
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError};

use super::discovery::{Coverage, Discovered, GroupKind, Member, Process, SysRoots, Viability};
use super::fds::{Attachment, KernelFds, KernelPath};
use super::open_error::OpenError;
use super::sys;

/// How to open a device.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Which way. `None`: iommufd where the device's own node and `/dev/iommu` exist, else the container.
    pub path: Option<KernelPath>,
    /// Where the kernel shows itself. The container path looks for nodes here but opens those below `/dev`, because
    /// vfio-ioctls does.
    pub roots: SysRoots,
}

/// Opens `device` and attaches it to an address space of its own.
pub(super) fn open(device: &Discovered, options: &OpenOptions) -> Result<KernelFds, OpenError> {
    if !device.is_vfio() {
        return Err(OpenError::NotBoundToVfio {
            name: device.name.to_string(),
            driver: device.driver.clone(),
        });
    }
    // sysfs names a node also on kernels that never make it.
    let cdev = device.cdev.as_ref().filter(|cdev| cdev.exists);
    let iommu = options.roots.dev.join("iommu");
    let path = options.path.unwrap_or(if cdev.is_some() && iommu.exists() {
        KernelPath::Iommufd
    } else {
        KernelPath::Container
    });
    match path {
        KernelPath::Container => open_by_group(device, &options.roots),
        KernelPath::Iommufd => {
            let cdev =
                cdev.ok_or_else(|| no_node(device, path, &options.roots.dev.join("vfio/devices/vfioN")))?;
            open_by_cdev(device, &cdev.path, &iommu)
        }
    }
}

fn open_by_cdev(device: &Discovered, cdev: &Path, iommu: &Path) -> Result<KernelFds, OpenError> {
    let os = |doing| move |source| OpenError::Os { name: device.name.to_string(), doing, source };
    let fd = open_node(device, KernelPath::Iommufd, cdev)?;
    let iommufd = open_node(device, KernelPath::Iommufd, iommu)?;

    let mut alloc = iommu_ioas_alloc {
        // Three words; the kernel wants the size that the caller knows.
        size: 12,
        flags: 0,
        out_ioas_id: 0,
    };
    // iommufd-ioctls wants to own an fd, so it gets a duplicate for the one call.
    let duplicate = iommufd.try_clone().map_err(os("duplicating the iommufd"))?;
    IommuFd::new_from_fd(File::from(duplicate))
        .alloc_iommu_ioas(&mut alloc)
        .map_err(|error| os("allocating an I/O address space")(sys::memory::errno(error)))?;

    sys::bind_iommufd(fd.as_fd(), iommufd.as_fd()).map_err(|source| {
        // EBUSY: the group is open the other way, or its DMA belongs to a driver. EINVAL: the cdev is open elsewhere.
        let taken = matches!(source.raw_os_error(), Some(libc::EBUSY | libc::EINVAL | libc::EPERM));
        let blockers = blockers(device);
        if taken && !blockers.is_empty() {
            return not_viable(device, blockers);
        }
        if matches!(source.raw_os_error(), Some(libc::EBUSY | libc::EINVAL)) {
            return in_use(device, cdev, source);
        }
        os("binding the device to an iommufd")(source)
    })?;
    sys::attach_ioas(fd.as_fd(), alloc.out_ioas_id)
        .map_err(os("attaching the device to an I/O address space"))?;
    Ok(KernelFds { device: fd, attachment: Attachment::Iommufd { iommufd, ioas_id: alloc.out_ioas_id } })
}

fn open_by_group(device: &Discovered, roots: &SysRoots) -> Result<KernelFds, OpenError> {
    let Some(group) = device.iommu_group.as_ref().filter(|group| group.kind != GroupKind::NoIommu) else {
        return Err(OpenError::NoIommu { name: device.name.to_string() });
    };
    let container_node = roots.dev.join("vfio/vfio");
    for node in [&container_node, &group.node.path] {
        if !node.exists() {
            return Err(no_node(device, KernelPath::Container, node));
        }
    }
    let explained = |error| explain(device, &group.node.path, &container_node, error);
    let folder = device.sysfs.canonicalize().map_err(|source| OpenError::Os {
        name: device.name.to_string(),
        doing: "finding the device's folder in sysfs",
        source,
    })?;
    let container = Arc::new(VfioContainer::new(None).map_err(explained)?);
    let opened = VfioDevice::new(&folder, container.clone(), false).map_err(explained)?;
    let duplicates =
        sys::duplicate_device(&opened).and_then(|device| Ok((device, sys::duplicate_container(&container)?)));
    // See the module's head: this must not take the agent down, whatever sysfs looks like by now.
    if panic::catch_unwind(AssertUnwindSafe(move || drop(opened))).is_err() {
        tracing::warn!(device = %device.name, "vfio-ioctls panicked while it let go of the device");
    }
    let (device_fd, container) = duplicates.map_err(|source| OpenError::Os {
        name: device.name.to_string(),
        doing: "duplicating the device's fds",
        source,
    })?;
    Ok(KernelFds { device: device_fd, attachment: Attachment::Container { container } })
}

/// Opens a node for reading and writing, close-on-exec.
fn open_node(device: &Discovered, path: KernelPath, node: &Path) -> Result<OwnedFd, OpenError> {
    match FileOptions::new().read(true).write(true).open(node) {
        Ok(file) => Ok(file.into()),
        Err(source) => Err(node_error(device, path, node, source)),
    }
}

fn node_error(device: &Discovered, path: KernelPath, node: &Path, source: io::Error) -> OpenError {
    match source.raw_os_error() {
        // ENODEV and ENXIO: a node without a driver behind it, for example made by hand or left over.
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => no_node(device, path, node),
        Some(libc::EACCES | libc::EPERM) => OpenError::Permission { node: node.to_owned(), source },
        Some(libc::EBUSY) => in_use(device, node, source),
        _ => OpenError::Os { name: device.name.to_string(), doing: "opening its node", source },
    }
}

fn no_node(device: &Discovered, path: KernelPath, node: &Path) -> OpenError {
    OpenError::NoNode { name: device.name.to_string(), path, node: node.to_owned() }
}

/// What an error of vfio-ioctls means here. Its variants that nobody can do anything about keep their own words.
fn explain(device: &Discovered, group_node: &Path, container_node: &Path, error: VfioError) -> OpenError {
    if matches!(error, VfioError::GroupViable) {
        return not_viable(device, blockers(device));
    }
    // vfio-ioctls drops the errno of SET_CONTAINER; the kernel refuses it for a group that stopped being viable
    // since its status was read.
    if matches!(error, VfioError::GroupSetContainer) {
        let blockers = blockers(device);
        if !blockers.is_empty() {
            return not_viable(device, blockers);
        }
    }
    let (node, source): (PathBuf, io::Error) = if let VfioError::OpenGroup(source, _) = error {
        (group_node.to_owned(), source)
    } else if let VfioError::OpenContainer(source) = error {
        (container_node.to_owned(), source)
    } else {
        return OpenError::Group { name: device.name.to_string(), source: error };
    };
    node_error(device, KernelPath::Container, &node, source)
}

fn in_use(device: &Discovered, node: &Path, source: io::Error) -> OpenError {
    let mut by: Vec<Process> = device.holders.processes.iter().map(|holder| holder.process.clone()).collect();
    // Who opened a device through its group and closed the group's file, as this module does, shows as the holder
    // of some device only.
    if let (true, Coverage::Partial { unattributed, .. }) = (by.is_empty(), &device.holders.coverage) {
        by.clone_from(unattributed);
    }
    OpenError::InUse { name: device.name.to_string(), node: node.to_owned(), by, source }
}

/// The members of the group whose drivers stand in the way, as sysfs showed them before the attempt.
fn blockers(device: &Discovered) -> Vec<Member> {
    match device.iommu_group.as_ref().map(|group| &group.viability) {
        Some(Viability::NotViable { blocked_by }) => blocked_by.clone(),
        Some(Viability::Viable | Viability::Unknown { .. }) | None => Vec::new(),
    }
}

fn not_viable(device: &Discovered, blockers: Vec<Member>) -> OpenError {
    let name = device.name.to_string();
    match &device.iommu_group {
        Some(group) => OpenError::GroupNotViable { name, group: group.id, blockers },
        None => OpenError::NoIommu { name },
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::facts::fake::{PCI, Tree};
    use super::*;
    use crate::chain;

    fn refusal(tree: &Tree, path: Option<KernelPath>) -> OpenError {
        open(&tree.find(PCI), &OpenOptions { path, roots: tree.roots() }).unwrap_err()
    }

    #[test]
    fn a_device_of_another_driver_is_not_touched() {
        let tree = Tree::new();
        tree.function(PCI, Some("e1000e"));
        let error = refusal(&tree, None);
        assert!(
            matches!(&error, OpenError::NotBoundToVfio { driver: Some(driver), .. } if driver == "e1000e")
        );
        assert!(error.to_string().contains("driver_override"), "{error}");
    }

    #[test]
    fn without_a_group_there_is_no_iommu() {
        let tree = Tree::new();
        tree.function(PCI, Some("vfio-pci"));
        assert!(matches!(refusal(&tree, None), OpenError::NoIommu { .. }));
    }

    #[test]
    fn a_missing_node_is_named() {
        let tree = Tree::new();
        let path = tree.function(PCI, Some("vfio-pci"));
        tree.group(7, &[&path]);
        let missing = |error| {
            let OpenError::NoNode { node, path, .. } = error else { panic!("{error}") };
            (node.strip_prefix(tree.roots().dev).unwrap().display().to_string(), path)
        };
        assert_eq!(missing(refusal(&tree, None)), ("vfio/vfio".to_owned(), KernelPath::Container));
        tree.node("vfio/vfio");
        assert_eq!(missing(refusal(&tree, None)), ("vfio/7".to_owned(), KernelPath::Container));
        assert_eq!(
            missing(refusal(&tree, Some(KernelPath::Iommufd))),
            ("vfio/devices/vfioN".to_owned(), KernelPath::Iommufd)
        );
        fs::create_dir_all(path.join("vfio-dev/vfio0")).unwrap();
        tree.node("vfio/devices/vfio0");
        assert_eq!(
            missing(refusal(&tree, Some(KernelPath::Iommufd))),
            ("iommu".to_owned(), KernelPath::Iommufd)
        );
        // Both nodes: iommufd is what `None` means, and a file that is no iommufd is refused by the kernel.
        tree.node("iommu");
        let error = refusal(&tree, None);
        assert_eq!(
            chain(&error),
            format!(
                "allocating an I/O address space failed for {PCI}: Inappropriate ioctl for device (os error 25)"
            )
        );
    }

    #[test]
    fn an_errno_of_a_node_is_named() {
        let tree = Tree::new();
        tree.function(PCI, Some("vfio-pci"));
        let device = tree.find(PCI);
        let named = |errno| {
            node_error(
                &device,
                KernelPath::Container,
                Path::new("/dev/vfio/7"),
                io::Error::from_raw_os_error(errno),
            )
        };
        assert!(matches!(named(libc::EBUSY), OpenError::InUse { .. }));
        assert!(matches!(named(libc::EACCES), OpenError::Permission { .. }));
        assert!(matches!(named(libc::EPERM), OpenError::Permission { .. }));
        assert!(matches!(named(libc::ENODEV), OpenError::NoNode { .. }));
        assert!(matches!(named(libc::EIO), OpenError::Os { .. }));
    }

    #[test]
    fn a_group_that_is_not_viable_is_told_with_who_blocks_it() {
        let tree = Tree::new();
        let ours = tree.function(PCI, Some("vfio-pci"));
        let nic = tree.function("0000:03:00.1", Some("e1000e"));
        tree.group(7, &[&ours, &nic]);
        let device = tree.find(PCI);
        for error in [VfioError::GroupViable, VfioError::GroupSetContainer] {
            let error = explain(&device, Path::new("/dev/vfio/7"), Path::new("/dev/vfio/vfio"), error);
            assert_eq!(
                error.to_string(),
                format!(
                    "IOMMU group 7 of {PCI} is not viable: 0000:03:00.1 (e1000e) in the way; bind every device of \
                     the group to a VFIO driver, or to none"
                )
            );
        }
    }

    #[test]
    fn an_error_of_vfio_ioctls_without_a_name_here_keeps_its_own_words() {
        let tree = Tree::new();
        let path = tree.function(PCI, Some("vfio-pci"));
        tree.group(7, &[&path]);
        let device = tree.find(PCI);
        let explained =
            |error| explain(&device, Path::new("/dev/vfio/7"), Path::new("/dev/vfio/vfio"), error);
        assert_eq!(
            chain(&explained(VfioError::GroupSetContainer)),
            format!("opening {PCI} through its group failed: failed to add vfio group into vfio container")
        );
        let busy = || io::Error::from_raw_os_error(libc::EBUSY);
        assert!(matches!(explained(VfioError::OpenGroup(busy(), "7".to_owned())), OpenError::InUse { .. }));
    }
}
