//! The memory that a device process may ask for over the socket.

use std::fmt;

/// Memory that is mapped for the device, as it asks for it with `DMA_READ` and `DMA_WRITE`. Called in the middle of any
/// call on the device, so it must not call the device.
pub trait DmaTarget: fmt::Debug + Send {
    /// Fills the buffer from `iova` on. The error is the errno to answer.
    fn read(&mut self, iova: u64, buffer: &mut [u8]) -> Result<(), i32>;

    /// Takes bytes at `iova`. The error is the errno to answer.
    fn write(&mut self, iova: u64, bytes: &[u8]) -> Result<(), i32>;
}

/// No memory at all: an agent that maps none. Every access is EFAULT.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoMemory;

impl DmaTarget for NoMemory {
    fn read(&mut self, _iova: u64, _buffer: &mut [u8]) -> Result<(), i32> {
        Err(libc::EFAULT)
    }

    fn write(&mut self, _iova: u64, _bytes: &[u8]) -> Result<(), i32> {
        Err(libc::EFAULT)
    }
}
