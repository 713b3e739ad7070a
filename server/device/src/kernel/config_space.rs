//! PCI configuration space and interrupts of a kernel device.
//!
//! ```text
//!   PCI_COMMAND     pread/pwrite at region offset + 4      what vfio shows: I/O, memory and INTx bits virtualised
//!   MSI, MSI-X      SET_IRQS                               the kernel arms and disarms; the registers only show it
//! ```
//!
//! # What is captured of interrupts, and why not from the registers
//! The kernel alone turns MSI and MSI-X on, on `SET_IRQS`. What configuration space shows of it differs: the MSI-X
//! enable bit is the hardware's, but MSI's control byte is virtual and holds what was last *written* there, which a
//! VMM does before MSI is armed, so that it reads as off while MSI is on (`vfio_msi_config_write`). mtty has no
//! capability list at all and still does MSI. So the kernel is asked itself: `SET_IRQS` with "signal vector n, if
//! false" changes nothing and succeeds exactly where that kind is armed.
//!
//! How many vectors: what this handle armed, where it did. Otherwise the highest vector that the kernel accepts:
//! up to Linux 6.4 that is the number armed; since 6.5 it is the size of the device's table, an upper bound, because
//! vectors come and go one by one. Whoever owns the eventfds knows better, and may arm fewer.
//!
//! # Failure paths
//! A short read or write of configuration space is EIO. Arming replaces: what was armed of that kind is disarmed
//! first, because the kernel cannot grow a set of vectors on every device; if the arming then fails, nothing is armed.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use vfio_bindings::bindings::vfio as uapi;

use super::device::OpenDevice;
use super::sys::{self, Irqs};
use crate::config_space::MAX_VECTORS;
use crate::{Call, ConfigCapture, ConfigSpace, DeviceError, InterruptKind, PciCommand, Rearm};

/// Offset of the command register.
const PCI_COMMAND: u64 = 4;
/// A configuration space that has less than the standard header is none.
const HEADER_BYTES: u64 = 64;

/// Where configuration space lies in the device's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct ConfigRegion {
    offset: u64,
}

impl ConfigRegion {
    /// The region of a device that says it is PCI, if it has a usable one.
    pub(super) fn of(device: BorrowedFd<'_>) -> Option<Self> {
        let info = sys::region_info(device, uapi::VFIO_PCI_CONFIG_REGION_INDEX)
            .inspect_err(|error| tracing::debug!(%error, "no configuration space"))
            .ok()?;
        let readable = info.flags & uapi::VFIO_REGION_INFO_FLAG_READ != 0;
        (readable && info.size >= HEADER_BYTES).then_some(Self { offset: info.offset })
    }
}

fn index(kind: InterruptKind) -> u32 {
    match kind {
        InterruptKind::Msi => uapi::VFIO_PCI_MSI_IRQ_INDEX,
        InterruptKind::MsiX => uapi::VFIO_PCI_MSIX_IRQ_INDEX,
    }
}

impl ConfigSpace for OpenDevice {
    fn capture(&mut self) -> Result<ConfigCapture, DeviceError> {
        let command = self.command()?;
        let interrupts = self.armed_interrupts()?;
        Ok(ConfigCapture { command, interrupts })
    }

    fn command(&mut self) -> Result<PciCommand, DeviceError> {
        let call = Call::ConfigRead;
        let region = self.config_region().ok_or(DeviceError::Absent { call })?;
        let mut register = [0; 2];
        let read = rustix::io::retry_on_intr(|| {
            rustix::io::pread(&self.fds().device, &mut register, region.offset + PCI_COMMAND)
        })
        .map_err(|errno| DeviceError::os(call, errno.into()))?;
        if read != register.len() {
            return Err(DeviceError::errno(call, libc::EIO));
        }
        Ok(PciCommand(u16::from_le_bytes(register)))
    }

    fn set_command(&mut self, command: PciCommand) -> Result<(), DeviceError> {
        let call = Call::ConfigWrite;
        let region = self.config_region().ok_or(DeviceError::Absent { call })?;
        let register = command.0.to_le_bytes();
        let written = rustix::io::pwrite(&self.fds().device, &register, region.offset + PCI_COMMAND)
            .map_err(|errno| DeviceError::os(call, errno.into()))?;
        if written != register.len() {
            return Err(DeviceError::errno(call, libc::EIO));
        }
        Ok(())
    }

    fn arm(&mut self, kind: InterruptKind, eventfds: &[BorrowedFd<'_>]) -> Result<(), DeviceError> {
        let vectors = self.vectors(kind)?;
        let asked = u32::try_from(eventfds.len()).unwrap_or(u32::MAX);
        if asked == 0 || asked > vectors {
            return Err(DeviceError::Argument {
                call: Call::SetIrqs,
                reason: format!(
                    "{asked} eventfds were given; the device has 1 to {vectors} vectors of this kind"
                ),
            });
        }
        self.disarm(kind)?;
        self.set_irqs(kind, Irqs::Arm(eventfds))?;
        self.remember_armed(Some(Rearm { kind, vectors: asked }));
        Ok(())
    }

    fn disarm(&mut self, kind: InterruptKind) -> Result<(), DeviceError> {
        match self.set_irqs(kind, Irqs::Disarm) {
            // Both mean that none of the kind is armed. EINVAL: the other kind is, or none, or the device has no
            // vectors of this one; the request itself is always well formed. ENOTTY: it does not know the kind.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => {}
            other => other?,
        }
        if self.remembered_armed().is_some_and(|armed| armed.kind == kind) {
            self.remember_armed(None);
        }
        Ok(())
    }
}

impl OpenDevice {
    /// Signals the eventfd of one armed vector, as the device would: to try out what was armed, and to make up for
    /// an interrupt that was lost while nobody listened. A vector that is not armed is passed over in silence; EINVAL
    /// where none of the kind is armed.
    pub fn trigger(&mut self, kind: InterruptKind, vector: u32) -> Result<(), DeviceError> {
        self.set_irqs(kind, Irqs::Trigger(vector))
    }

    /// How many vectors of a kind the device has: 0 where it does not know the kind.
    pub fn vectors(&self, kind: InterruptKind) -> Result<u32, DeviceError> {
        match sys::irq_info(self.fds().device.as_fd(), index(kind)) {
            Ok(info) => Ok(info.count.min(MAX_VECTORS)),
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => Ok(0),
            Err(error) => Err(DeviceError::os(Call::SetIrqs, error)),
        }
    }

    fn set_irqs(&self, kind: InterruptKind, irqs: Irqs<'_>) -> Result<(), DeviceError> {
        sys::set_irqs(self.fds().device.as_fd(), index(kind), irqs)
            .map_err(|source| DeviceError::os(Call::SetIrqs, source))
    }

    /// The kind of interrupt that is armed. The kernel arms one kind at a time.
    fn armed_interrupts(&self) -> Result<Option<Rearm>, DeviceError> {
        for kind in [InterruptKind::MsiX, InterruptKind::Msi] {
            let accepted = highest_accepted(self.vectors(kind)?, |vector| {
                sys::set_irqs(self.fds().device.as_fd(), index(kind), Irqs::Ask(vector))
            })
            .map_err(|source| DeviceError::os(Call::SetIrqs, source))?;
            if accepted > 0 {
                let own = self.remembered_armed().filter(|armed| armed.kind == kind);
                return Ok(Some(own.unwrap_or(Rearm { kind, vectors: accepted })));
            }
        }
        Ok(None)
    }
}

/// How many of `vectors` the kernel accepts, counting from vector 0: it accepts a first part of them, perhaps none.
fn highest_accepted(vectors: u32, ask: impl Fn(u32) -> io::Result<()>) -> io::Result<u32> {
    let (mut accepted, mut refused) = (0, vectors);
    while accepted < refused {
        let middle = accepted + (refused - accepted) / 2;
        match ask(middle) {
            Ok(()) => accepted = middle + 1,
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)) => {
                refused = middle;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(accepted)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn kernel(armed: u32, asked: &Cell<u32>) -> impl Fn(u32) -> io::Result<()> {
        move |vector| {
            asked.set(asked.get() + 1);
            if vector < armed { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EINVAL)) }
        }
    }

    #[test]
    fn the_number_of_vectors_is_found_in_a_few_questions() {
        for vectors in [0_u32, 1, 2, 5, 32, 2047, 2048] {
            for armed in [0, 1, vectors / 2, vectors.saturating_sub(1), vectors] {
                let asked = Cell::new(0);
                let found = highest_accepted(vectors, kernel(armed, &asked)).unwrap();
                assert_eq!(found, armed.min(vectors), "{armed} of {vectors}");
                assert!(asked.get() <= 12, "{armed} of {vectors} took {} questions", asked.get());
            }
        }
    }

    #[test]
    fn an_errno_that_answers_nothing_is_an_error() {
        let error = highest_accepted(4, |_| Err(io::Error::from_raw_os_error(libc::ENODEV))).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }
}
