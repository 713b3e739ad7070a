//! Memory for a device's DMA, owned by this process.
//!
//! ```text
//!   DmaMemory (memfd) --OpenDevice::map_dma(iova)--> DmaMapping --unmap--> DmaMemory
//!     read/write at an offset                          read/write at an offset, device writes too
//! ```
//!
//! # Invariants
//! - Content is reached by copying, never by reference: the device may write at any moment.
//! - A [`DmaMapping`] holds its own duplicate of the container or iommufd, so that it can be taken away also after
//!   the device was lent or handed back.
//!
//! # Failure paths
//! Dropping a [`DmaMapping`] takes nothing away: the memory stays mapped for whoever else holds the container or
//! iommufd, and for as long. Its range of addresses in this process is then never used again.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustix::fs::{MemfdFlags, SealFlags};

use super::sys::memory::{Pages, Pinned, Space};
use crate::{Call, DeviceError};

/// Zeroed memory that no device sees yet.
#[derive(Debug)]
pub struct DmaMemory {
    file: File,
    pages: Pages,
}

impl DmaMemory {
    /// Allocates `length_bytes`, a positive multiple of the page size, as the IOMMU demands (EINVAL otherwise, here
    /// or when it is mapped). The kernel zeroes it.
    pub fn new(length_bytes: usize) -> io::Result<Self> {
        let file = rustix::fs::memfd_create(c"vfio-dma", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&file, length_bytes as u64)?;
        // A file that shrank under its mapping would turn accesses to it into SIGBUS.
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let pages = Pages::map(&file, length_bytes)?;
        Ok(Self { file: File::from(file), pages })
    }

    /// Size in bytes.
    pub fn length_bytes(&self) -> u64 {
        self.pages.length_bytes()
    }

    /// Copies out what is at `offset`. `UnexpectedEof` where the buffer reaches past the end.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    /// Copies `bytes` to `offset`. EPERM where they reach past the end.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    pub(super) fn map(self, space: Space, iova: u64) -> io::Result<DmaMapping> {
        let Self { file, pages } = self;
        Ok(DmaMapping { pinned: Pinned::pin(space, iova, pages)?, file })
    }
}

/// Memory that a device can read and write.
#[derive(Debug)]
pub struct DmaMapping {
    file: File,
    pinned: Pinned,
}

impl DmaMapping {
    /// Where the device sees the memory.
    pub fn iova(&self) -> u64 {
        self.pinned.iova()
    }

    /// Copies out what is at `offset` from the start of the memory, torn where the device is writing.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }

    /// Copies `bytes` to `offset` from the start of the memory.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Takes the memory away from the device.
    ///
    /// ENOENT where the kernel had forgotten all or part of it already. On any error the memory counts as still
    /// mapped and is leaked.
    pub fn unmap(self) -> Result<DmaMemory, DeviceError> {
        let Self { file, pinned } = self;
        let pages = pinned.unpin().map_err(|source| DeviceError::os(Call::UnmapDma, source))?;
        Ok(DmaMemory { file, pages })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_starts_zeroed_and_keeps_what_is_written() {
        let memory = DmaMemory::new(8192).unwrap();
        assert_eq!(memory.length_bytes(), 8192);
        let mut buffer = [0xff; 4];
        memory.read(8188, &mut buffer).unwrap();
        assert_eq!(buffer, [0; 4]);
        memory.write(100, &[1, 2, 3, 4]).unwrap();
        memory.read(100, &mut buffer).unwrap();
        assert_eq!(buffer, [1, 2, 3, 4]);
    }

    #[test]
    fn memory_neither_grows_nor_reads_past_its_end() {
        let memory = DmaMemory::new(4096).unwrap();
        assert_eq!(memory.read(4095, &mut [0; 2]).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(memory.write(4096, &[1]).unwrap_err().raw_os_error(), Some(libc::EPERM));
    }

    #[test]
    fn no_memory_is_an_error_and_not_an_empty_mapping() {
        assert_eq!(DmaMemory::new(0).unwrap_err().raw_os_error(), Some(libc::EINVAL));
    }
}
