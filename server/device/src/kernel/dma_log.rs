//! The DMA log of a kernel device.
//!
//! ```text
//!   START(page size, ranges) -> page size in force;  REPORT(range) -> bits set, log cleared;  STOP
//! ```
//!
//! # Failure paths
//! Every errno comes through. After a failed REPORT the log may have been cleared in part without the bits having
//! arrived, so the caller treats every page as written. Kernels take at most 256 ranges, of whole pages.

use std::os::fd::AsFd;

use super::device::KernelDevice;
use super::sys;
use crate::{Call, DeviceError, DirtyBitmap, DmaLog, IovaRange};

impl DmaLog for KernelDevice {
    fn start(&mut self, page_bytes: u64, ranges: &[IovaRange]) -> Result<u64, DeviceError> {
        let ranges: Vec<(u64, u64)> =
            ranges.iter().map(|range| (range.start(), range.length_bytes())).collect();
        sys::dma_log_start(self.fds().device.as_fd(), page_bytes, &ranges)
            .map_err(|source| DeviceError::os(Call::DmaLogStart, source))
    }

    fn report(&mut self, bitmap: &mut DirtyBitmap) -> Result<(), DeviceError> {
        let (range, page_bytes) = (bitmap.range(), bitmap.page_bytes());
        sys::dma_log_report(
            self.fds().device.as_fd(),
            range.start(),
            range.length_bytes(),
            page_bytes,
            bitmap.words_mut(),
        )
        .map_err(|source| DeviceError::os(Call::DmaLogReport, source))
    }

    fn stop(&mut self) -> Result<(), DeviceError> {
        sys::dma_log_stop(self.fds().device.as_fd())
            .map_err(|source| DeviceError::os(Call::DmaLogStop, source))
    }
}
