//! Memory that devices write to by DMA, and the address spaces that it is mapped in.
//!
//! ```text
//!   Pages (mmap, shared) --pin(space, iova)--> Pinned --unpin--> Pages --drop--> munmap
//!                                                \--drop: the mapping stays, the pages are never unmapped
//! ```
//!
//! # Invariants
//! - [`Pages`] hands out no reference and no pointer, so a device that writes whenever it likes races with no Rust
//!   code. Their content is read and written through the file behind them.
//! - While a kernel address space may hold the address, the pages stay where they are: for an emulated device the
//!   kernel pins through the address only when the device does its DMA, and would reach whatever lies there then.
//!
//! # Failure paths
//! A [`Pinned`] that is dropped, or that the kernel would not unpin, leaks its range of addresses. That is the safe
//! side: the mapping may live on in a duplicate of the container or iommufd that somebody else holds.

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr;

use iommufd_bindings::iommufd as iommufd_uapi;
use iommufd_ioctls::{IommuFd, IommufdError};
use libc::Ioctl;
use rustix::mm::{MapFlags, ProtFlags};
use vfio_bindings::bindings::vfio as uapi;

use super::{argsz, ioctl, request};

// These go to a container; to a device the same numbers mean something else.
const IOMMU_MAP_DMA: Ioctl = request(13);
const IOMMU_UNMAP_DMA: Ioctl = request(14);

/// A shared mapping of a file, unmapped on drop.
#[derive(Debug)]
pub(in super::super) struct Pages {
    // A number, not a pointer: nothing in this process ever dereferences it.
    address: usize,
    length: usize,
}

impl Pages {
    /// Maps the first `length` bytes of `file`.
    pub(in super::super) fn map(file: impl AsFd, length: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: no address is asked for, so the kernel picks a free one and no existing mapping is touched.
        let address =
            unsafe { rustix::mm::mmap(ptr::null_mut(), length, protection, MapFlags::SHARED, file, 0) }?;
        Ok(Self { address: address.expose_provenance(), length })
    }

    /// Size in bytes.
    pub(in super::super) fn length_bytes(&self) -> u64 {
        self.length as u64
    }

    fn address(&self) -> u64 {
        self.address as u64
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the range came from mmap in `map` and is unmapped here alone; nothing references into it, and no
        // address space of the kernel knows it, since `Pinned` keeps its pages from being dropped.
        let unmapped = unsafe {
            rustix::mm::munmap(ptr::with_exposed_provenance_mut::<c_void>(self.address), self.length)
        };
        if let Err(error) = unmapped {
            tracing::debug!(%error, "munmap of DMA memory");
        }
    }
}

/// An address space that devices do DMA in.
pub(in super::super) enum Space {
    /// A container of the group path.
    Container(OwnedFd),
    /// An I/O address space of an iommufd.
    Ioas {
        /// The iommufd.
        iommufd: IommuFd,
        /// Which of its address spaces.
        ioas_id: u32,
    },
}

impl std::fmt::Debug for Space {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Container(container) => f.debug_tuple("Container").field(container).finish(),
            Self::Ioas { ioas_id, .. } => {
                f.debug_struct("Ioas").field("ioas_id", ioas_id).finish_non_exhaustive()
            }
        }
    }
}

impl Space {
    /// An address space of an iommufd, which the value now owns.
    pub(in super::super) fn ioas(iommufd: OwnedFd, ioas_id: u32) -> Self {
        Self::Ioas { iommufd: IommuFd::new_from_fd(File::from(iommufd)), ioas_id }
    }

    /// Takes away what is mapped in a range. Returns how many bytes that were.
    pub(in super::super) fn unmap(&self, iova: u64, length_bytes: u64) -> io::Result<u64> {
        match self {
            Self::Container(container) => container_unmap(container.as_fd(), iova, length_bytes),
            Self::Ioas { iommufd, ioas_id } => {
                let mut unmap = iommufd_uapi::iommu_ioas_unmap {
                    size: argsz::<iommufd_uapi::iommu_ioas_unmap>(),
                    ioas_id: *ioas_id,
                    iova,
                    length: length_bytes,
                };
                iommufd.unmap_iommu_ioas(&mut unmap).map_err(errno)?;
                Ok(unmap.length)
            }
        }
    }

    fn map(&self, iova: u64, pages: &Pages) -> io::Result<()> {
        match self {
            Self::Container(container) => container_map(container.as_fd(), iova, pages),
            Self::Ioas { iommufd, ioas_id } => {
                let map = iommufd_uapi::iommu_ioas_map {
                    size: argsz::<iommufd_uapi::iommu_ioas_map>(),
                    flags: iommufd_uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_FIXED_IOVA
                        | iommufd_uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_READABLE
                        | iommufd_uapi::iommufd_ioas_map_flags_IOMMU_IOAS_MAP_WRITEABLE,
                    ioas_id: *ioas_id,
                    __reserved: 0,
                    user_va: pages.address(),
                    length: pages.length_bytes(),
                    iova,
                };
                iommufd.map_iommu_ioas(&map).map_err(errno)
            }
        }
    }
}

/// The errno inside an error of iommufd-ioctls.
pub(in super::super) fn errno(error: IommufdError) -> io::Error {
    if let IommufdError::IommuIoasAlloc(errno)
    | IommufdError::IommuIoasMap(errno)
    | IommufdError::IommuIoasUnmap(errno) = &error
    {
        return io::Error::from_raw_os_error(errno.errno());
    }
    io::Error::other(error)
}

/// Pages that are mapped for DMA. Dropping it leaves them so.
#[derive(Debug)]
pub(in super::super) struct Pinned {
    space: Space,
    iova: u64,
    pages: ManuallyDrop<Pages>,
}

impl Pinned {
    /// Maps `pages` at `iova`. Where the kernel refuses, the pages are unmapped from this process and gone.
    pub(in super::super) fn pin(space: Space, iova: u64, pages: Pages) -> io::Result<Self> {
        space.map(iova, &pages)?;
        Ok(Self { space, iova, pages: ManuallyDrop::new(pages) })
    }

    /// Where the device sees the pages.
    pub(in super::super) fn iova(&self) -> u64 {
        self.iova
    }

    /// Unmaps the pages from DMA and gives them back.
    ///
    /// ENOENT where the kernel had forgotten all or part of the mapping already.
    pub(in super::super) fn unpin(self) -> io::Result<Pages> {
        let Self { space, iova, pages } = self;
        let length_bytes = pages.length_bytes();
        if space.unmap(iova, length_bytes)? != length_bytes {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        Ok(ManuallyDrop::into_inner(pages))
    }
}

/// Maps pages for DMA at `iova` in a container. Called for [`Pinned`] alone, which keeps the pages where they are.
fn container_map(container: BorrowedFd<'_>, iova: u64, pages: &Pages) -> io::Result<()> {
    let mut map = uapi::vfio_iommu_type1_dma_map {
        argsz: argsz::<uapi::vfio_iommu_type1_dma_map>(),
        flags: uapi::VFIO_DMA_MAP_FLAG_READ | uapi::VFIO_DMA_MAP_FLAG_WRITE,
        vaddr: pages.address(),
        iova,
        size: pages.length_bytes(),
    };
    // SAFETY: the struct of this request. The device may write to the pages from now on, and no Rust reference into
    // them ever exists: `Pages` gives out their address as a number only.
    unsafe { ioctl(container, IOMMU_MAP_DMA, &raw mut map) }.map(drop)
}

/// Unmaps a range from DMA in a container. Returns how many bytes were mapped there and no longer are.
fn container_unmap(container: BorrowedFd<'_>, iova: u64, length_bytes: u64) -> io::Result<u64> {
    let mut unmap = uapi::vfio_iommu_type1_dma_unmap {
        argsz: argsz::<uapi::vfio_iommu_type1_dma_unmap>(),
        flags: 0,
        iova,
        size: length_bytes,
        ..Default::default()
    };
    // SAFETY: the struct of this request; without the flag that asks for a dirty bitmap no data follows it.
    unsafe { ioctl(container, IOMMU_UNMAP_DMA, &raw mut unmap) }?;
    Ok(unmap.size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_those_of_the_uapi() {
        assert_eq!(IOMMU_MAP_DMA, 0x3b71);
        assert_eq!(IOMMU_UNMAP_DMA, 0x3b72);
        assert_eq!(argsz::<uapi::vfio_iommu_type1_dma_map>(), 32);
        assert_eq!(argsz::<uapi::vfio_iommu_type1_dma_unmap>(), 24);
    }

    #[test]
    fn pages_show_what_the_file_holds_and_go_on_drop() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let pages = Pages::map(&file, 8192).unwrap();
        assert_eq!(pages.length_bytes(), 8192);
        assert_eq!(pages.address() % 4096, 0);
        drop(pages);
    }

    #[test]
    fn a_file_that_is_no_container_maps_nothing() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        for space in [
            Space::Container(file.try_clone().unwrap().into()),
            Space::ioas(file.try_clone().unwrap().into(), 1),
        ] {
            assert_eq!(space.unmap(0, 4096).unwrap_err().raw_os_error(), Some(libc::ENOTTY), "{space:?}");
            let pages = Pages::map(&file, 4096).unwrap();
            assert_eq!(Pinned::pin(space, 0, pages).unwrap_err().raw_os_error(), Some(libc::ENOTTY));
        }
    }
}
