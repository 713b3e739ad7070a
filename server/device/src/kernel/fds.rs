//! The fds that a kernel device consists of: owned, adopted, duplicated, handed back.
//!
//! ```text
//!                      KernelFds
//!   device ------------+        +------------ attachment
//!   the device's file           Container { container }   group path; the device's file keeps its group's file,
//!                                                         and that the container, alive
//!                               Iommufd { iommufd, ioas_id }   cdev path; the id names the address space in it
//! ```
//!
//! All duplicates of a file are equal: the device stays open, bound and attached until the last one is closed, in
//! whichever process that is. The group's own fd is not among them, because nobody needs it once the device is
//! open: each open device holds a reference on its group's file (`vfio_group_use_container` in the kernel).
//!
//! # Invariants
//! - Dropping the value closes its fds and does nothing else. Detaching is never implied: it would take the DMA
//!   away from every other holder.
//! - Closing the last duplicate of the device's file resets the device. Whoever must keep it holds a duplicate.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use serde::{Deserialize, Serialize};

use super::sys;
use super::sys::memory::Space;

/// The fds of one open device.
#[derive(Debug)]
pub struct KernelFds {
    /// The device's file: from its group, or its cdev after binding.
    pub device: OwnedFd,
    /// What the device does DMA in.
    pub attachment: Attachment,
}

/// The address space that a device is attached to.
#[derive(Debug)]
pub enum Attachment {
    /// A container, of the group path. One container is one address space.
    Container {
        /// The container's file.
        container: OwnedFd,
    },
    /// An I/O address space (IOAS) of an iommufd, of the cdev path.
    Iommufd {
        /// The iommufd's file.
        iommufd: OwnedFd,
        /// Which of the iommufd's address spaces.
        ioas_id: u32,
    },
}

impl KernelFds {
    /// New duplicates of all fds, close-on-exec. Fails where the process has no fd left.
    pub fn duplicate(&self) -> io::Result<Self> {
        Ok(Self { device: self.device.try_clone()?, attachment: self.attachment.duplicate()? })
    }

    /// Attaches the device to another address space of its iommufd, out of the one it is in. Everyone who holds the
    /// device's file sees the change. `Unsupported` on the group path, where the container is for life.
    pub fn attach(&mut self, to_ioas_id: u32) -> io::Result<()> {
        match &mut self.attachment {
            Attachment::Container { .. } => Err(io::ErrorKind::Unsupported.into()),
            Attachment::Iommufd { ioas_id, .. } => {
                sys::attach_ioas(self.device.as_fd(), to_ioas_id)?;
                *ioas_id = to_ioas_id;
                Ok(())
            }
        }
    }

    /// Takes the device out of its address space, **for every holder of its file**: its DMA ends. For handing a
    /// device to somebody who attaches it anew; closing fds needs no detaching. `Unsupported` on the group path.
    pub fn detach(&mut self) -> io::Result<()> {
        match &self.attachment {
            Attachment::Container { .. } => Err(io::ErrorKind::Unsupported.into()),
            Attachment::Iommufd { .. } => sys::detach_ioas(self.device.as_fd()),
        }
    }
}

impl Attachment {
    /// The path that leads to this kind of attachment.
    pub fn path(&self) -> KernelPath {
        match self {
            Self::Container { .. } => KernelPath::Container,
            Self::Iommufd { .. } => KernelPath::Iommufd,
        }
    }

    /// The container's or the iommufd's file.
    pub fn fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Container { container } => container.as_fd(),
            Self::Iommufd { iommufd, .. } => iommufd.as_fd(),
        }
    }

    fn duplicate(&self) -> io::Result<Self> {
        Ok(match self {
            Self::Container { container } => Self::Container { container: container.try_clone()? },
            Self::Iommufd { iommufd, ioas_id } => {
                Self::Iommufd { iommufd: iommufd.try_clone()?, ioas_id: *ioas_id }
            }
        })
    }

    /// The address space, through a duplicate of the fd.
    pub(super) fn space(&self) -> io::Result<Space> {
        Ok(match self {
            Self::Container { container } => Space::Container(container.try_clone()?),
            Self::Iommufd { iommufd, ioas_id } => Space::ioas(iommufd.try_clone()?, *ioas_id),
        })
    }
}

/// The two ways to a device. Kernels have one or both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KernelPath {
    /// `/dev/vfio/GROUP` and a container.
    Container,
    /// `/dev/vfio/devices/vfioN` and `/dev/iommu`.
    Iommufd,
}

impl fmt::Display for KernelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Container => "container",
            Self::Iommufd => "iommufd",
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use super::*;

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn duplicates_are_fds_of_their_own() {
        let fds =
            KernelFds { device: null(), attachment: Attachment::Iommufd { iommufd: null(), ioas_id: 7 } };
        let copy = fds.duplicate().unwrap();
        assert_ne!(fds.device.as_raw_fd(), copy.device.as_raw_fd());
        assert_ne!(fds.attachment.fd().as_raw_fd(), copy.attachment.fd().as_raw_fd());
        assert!(matches!(copy.attachment, Attachment::Iommufd { ioas_id: 7, .. }));
        assert!(rustix::io::fcntl_getfd(&copy.device).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    }

    #[test]
    fn a_container_is_for_life() {
        let mut fds = KernelFds { device: null(), attachment: Attachment::Container { container: null() } };
        assert_eq!(fds.attachment.path(), KernelPath::Container);
        assert_eq!(fds.attach(1).unwrap_err().kind(), io::ErrorKind::Unsupported);
        assert_eq!(fds.detach().unwrap_err().kind(), io::ErrorKind::Unsupported);
    }

    #[test]
    fn a_failed_attach_leaves_the_id_alone() {
        let mut fds =
            KernelFds { device: null(), attachment: Attachment::Iommufd { iommufd: null(), ioas_id: 7 } };
        assert_eq!(fds.attach(8).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        assert!(matches!(fds.attachment, Attachment::Iommufd { ioas_id: 7, .. }));
    }
}
