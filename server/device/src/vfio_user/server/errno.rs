//! From an error of a device to the errno in a reply.
//!
//! A device's own errno goes through as it is, so that a client sees what a caller in this process would see. What has
//! no errno gets the one that the kernel would answer. Never 0: a reply with the error bit and no errno says nothing.

use rustix::io::Errno;

use crate::DeviceError;

/// Largest errno that fits the kernel's own range of error values.
const MAX_ERRNO: i32 = 4095;

/// The errno for a reply.
pub(super) fn of(error: &DeviceError) -> Errno {
    match error {
        DeviceError::Os { source, .. } => match source.raw_os_error() {
            Some(errno @ 1..=MAX_ERRNO) => Errno::from_raw_os_error(errno),
            Some(_) | None => Errno::IO,
        },
        DeviceError::Forbidden { .. }
        | DeviceError::Argument { .. }
        | DeviceError::Undrained
        | DeviceError::Misplaced { .. }
        | DeviceError::Uncovered { .. } => Errno::INVAL,
        DeviceError::Absent { .. } => Errno::NOTTY,
        DeviceError::LeftOver { .. }
        | DeviceError::Engaged { .. }
        | DeviceError::ForeignSession { .. }
        | DeviceError::Quarantined { .. } => Errno::BUSY,
        DeviceError::GivenUp { .. } => Errno::CANCELED,
        DeviceError::Hung { .. } => Errno::TIMEDOUT,
        DeviceError::UnknownState(_)
        | DeviceError::Capabilities(_)
        | DeviceError::Stream { .. }
        | DeviceError::Elsewhere { .. }
        | DeviceError::Displaced { .. }
        | DeviceError::Peer { .. }
        | DeviceError::Poisoned => Errno::IO,
        DeviceError::Disconnected { .. } => Errno::CONNRESET,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Call;

    #[test]
    fn a_devices_errno_goes_through_and_no_error_is_success() {
        for errno in [libc::EINVAL, libc::ENODEV, libc::ENOSPC, MAX_ERRNO] {
            assert_eq!(of(&DeviceError::errno(Call::Read, errno)).raw_os_error(), errno);
        }
        for odd in [0, -1, MAX_ERRNO + 1, i32::MAX] {
            assert_eq!(of(&DeviceError::errno(Call::Read, odd)), Errno::IO);
        }
        assert_eq!(of(&DeviceError::os(Call::Read, std::io::Error::other("no errno"))), Errno::IO);
        assert_eq!(of(&DeviceError::Absent { call: Call::DataSize }), Errno::NOTTY);
    }
}
