//! The data fd of a session.
//!
//! ```text
//!   SET entering PRE_COPY, PRE_COPY_P2P or STOP_COPY --fd--> SaveFd      read until the session says it is the end
//!   SET entering RESUMING                            --fd--> RestoreFd   write until all is written
//! ```
//!
//! The stream belongs to the session and not to the device, so that a SET that the kernel rejects leaves it open.
//!
//! # Failure paths
//! ENOMSG from a read is an answer, not an error. A write that takes nothing is one: the interface promises
//! progress, and a caller that retried would spin. Everything else is the kernel's errno.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};

use vfio_bindings::bindings::vfio::VFIO_PRECOPY_INFO_REINIT;

use super::sys;
use crate::{Call, DeviceError, PrecopyInfo, Read, RestoreStream, SaveStream};

/// A saving data fd.
#[derive(Debug)]
pub(super) struct SaveFd {
    file: File,
    /// Whether the device opted in to flags that mean something; without, the kernel hands back noise.
    flags_mean_something: bool,
}

impl SaveFd {
    pub(super) fn new(fd: OwnedFd, flags_mean_something: bool) -> Self {
        Self { file: File::from(fd), flags_mean_something }
    }
}

impl SaveStream for SaveFd {
    fn read(&mut self, buffer: &mut [u8]) -> Result<Read, DeviceError> {
        if buffer.is_empty() {
            return Err(empty(Call::Read));
        }
        loop {
            return match self.file.read(buffer) {
                Ok(0) => Ok(Read::Zero),
                Ok(bytes) => Ok(Read::Bytes(bytes)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.raw_os_error() == Some(libc::ENOMSG) => Ok(Read::NothingNow),
                Err(error) => Err(DeviceError::os(Call::Read, error)),
            };
        }
    }

    fn precopy_info(&mut self) -> Result<PrecopyInfo, DeviceError> {
        let info = sys::precopy_info(self.file.as_fd())
            .map_err(|source| DeviceError::os(Call::PrecopyInfo, source))?;
        Ok(PrecopyInfo {
            initial_bytes: info.initial_bytes,
            dirty_bytes: info.dirty_bytes,
            reinit: self.flags_mean_something && info.flags & VFIO_PRECOPY_INFO_REINIT != 0,
        })
    }
}

/// A resuming data fd.
#[derive(Debug)]
pub(super) struct RestoreFd {
    file: File,
}

impl RestoreFd {
    pub(super) fn new(fd: OwnedFd) -> Self {
        Self { file: File::from(fd) }
    }
}

impl RestoreStream for RestoreFd {
    fn write(&mut self, bytes: &[u8]) -> Result<usize, DeviceError> {
        if bytes.is_empty() {
            return Err(empty(Call::Write));
        }
        loop {
            return match self.file.write(bytes) {
                Ok(0) => Err(DeviceError::errno(Call::Write, libc::EIO)),
                Ok(taken) => Ok(taken),
                // The kernel gives EINTR only where it took nothing; a part that was taken is a short write.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => Err(DeviceError::os(Call::Write, error)),
            };
        }
    }
}

/// An empty buffer would make a read's 0 look like the end, and a write of it mean nothing.
fn empty(call: Call) -> DeviceError {
    DeviceError::Argument { call, reason: "the buffer is empty; give at least one byte".to_owned() }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek as _, SeekFrom};

    use super::*;

    fn file(content: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        file
    }

    #[test]
    fn reading_gives_bytes_and_then_zero() {
        let mut stream = SaveFd::new(file(b"abc").into(), false);
        let mut buffer = [0; 2];
        assert_eq!(stream.read(&mut buffer).unwrap(), Read::Bytes(2));
        assert_eq!(&buffer, b"ab");
        assert_eq!(stream.read(&mut buffer).unwrap(), Read::Bytes(1));
        assert_eq!(stream.read(&mut buffer).unwrap(), Read::Zero);
        assert_eq!(stream.read(&mut buffer).unwrap(), Read::Zero);
    }

    #[test]
    fn an_empty_buffer_never_looks_like_the_end() {
        let mut save = SaveFd::new(file(b"abc").into(), false);
        assert!(matches!(save.read(&mut []), Err(DeviceError::Argument { call: Call::Read, .. })));
        let mut restore = RestoreFd::new(file(b"").into());
        assert!(matches!(restore.write(&[]), Err(DeviceError::Argument { call: Call::Write, .. })));
    }

    #[test]
    fn an_errno_comes_through_with_its_call() {
        let write_only = File::options().write(true).open("/dev/null").unwrap();
        let mut save = SaveFd::new(write_only.into(), false);
        let error = save.read(&mut [0]).unwrap_err();
        assert!(matches!(error, DeviceError::Os { call: Call::Read, .. }));
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        let error = save.precopy_info().unwrap_err();
        assert!(matches!(error, DeviceError::Os { call: Call::PrecopyInfo, .. }));
        assert_eq!(error.raw_os_error(), Some(libc::ENOTTY));
        let full = File::options().write(true).open("/dev/full").unwrap();
        let error = RestoreFd::new(full.into()).write(b"x").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }
}
