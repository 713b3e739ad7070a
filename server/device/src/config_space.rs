//! PCI configuration space: what is captured with a save, and the fix-ups after a load.
//!
//! A device's migration blob does not hold what the VFIO core emulates or owns in configuration space. A restored
//! function comes up with PCI_COMMAND at its reset value and with no interrupt armed: without bus mastering an
//! mlx5 function, for one, times out on its command queue. So a save captures [`ConfigCapture`] once the device has
//! stopped, and a restore
//! 1. writes back the [whitelisted](PciCommand::RESTORED) PCI_COMMAND bits while the device is in RESUMING, and
//! 2. has MSI or MSI-X armed again by **whoever owns the eventfds**: this process ([`Rearm::apply`]) or the
//!    workload of a lent device, which then says that it is [ready](crate::driver::FixedUp::ready).
//!
//! Addresses in BARs are not captured: they belong to the slot, not to the state that moves.

use std::os::fd::BorrowedFd;

use serde::{Deserialize, Serialize};

use crate::DeviceError;

/// The PCI_COMMAND register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct PciCommand(pub u16);

impl PciCommand {
    /// Responds to I/O space accesses.
    pub const IO: u16 = 1 << 0;
    /// Responds to memory space accesses.
    pub const MEMORY: u16 = 1 << 1;
    /// May issue DMA and message-signalled interrupts.
    pub const BUS_MASTER: u16 = 1 << 2;
    /// Must not raise INTx.
    pub const INTX_DISABLE: u16 = 1 << 10;
    /// The bits that a restore writes. The rest (parity and SERR# reporting, fast back-to-back …) is policy of the
    /// node that the device is on, not state of the device.
    pub const RESTORED: u16 = Self::IO | Self::MEMORY | Self::BUS_MASTER | Self::INTX_DISABLE;

    /// This register with the whitelisted bits of `captured`.
    #[must_use]
    pub fn with_restored_bits_of(self, captured: Self) -> Self {
        Self((self.0 & !Self::RESTORED) | (captured.0 & Self::RESTORED))
    }
}

/// A kind of interrupt that a PCI function can be armed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InterruptKind {
    /// Message-signalled interrupts, up to 32 vectors.
    Msi,
    /// MSI-X, up to 2048 vectors.
    MsiX,
}

/// The most vectors any kind of interrupt has (MSI-X by the PCI specification).
pub const MAX_VECTORS: u32 = 2048;

/// Interrupts that were armed when the state was captured, and must be again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rearm {
    /// MSI or MSI-X.
    pub kind: InterruptKind,
    /// How many vectors were enabled, 1 to [`MAX_VECTORS`].
    pub vectors: u32,
}

impl Rearm {
    /// Arms the vectors with the caller's eventfds, one a vector from vector 0.
    pub fn apply(self, space: &mut dyn ConfigSpace, eventfds: &[BorrowedFd<'_>]) -> Result<(), DeviceError> {
        if usize::try_from(self.vectors).ok() != Some(eventfds.len()) {
            return Err(DeviceError::Argument {
                call: crate::Call::SetIrqs,
                reason: format!(
                    "{} vectors were armed and {} eventfds were given; give one a vector",
                    self.vectors,
                    eventfds.len()
                ),
            });
        }
        space.arm(self.kind, eventfds)
    }
}

/// What a save takes from configuration space, once the device has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigCapture {
    /// The command register.
    pub command: PciCommand,
    /// Interrupts that were enabled, if any were.
    pub interrupts: Option<Rearm>,
}

/// The PCI configuration space of a device and its interrupts.
pub trait ConfigSpace: std::fmt::Debug {
    /// Reads the command register and what interrupts are enabled.
    fn capture(&mut self) -> Result<ConfigCapture, DeviceError>;

    /// Reads the command register.
    fn command(&mut self) -> Result<PciCommand, DeviceError>;

    /// Writes the command register.
    fn set_command(&mut self, command: PciCommand) -> Result<(), DeviceError>;

    /// Arms interrupts from vector 0 with these eventfds, one a vector, replacing what was armed of that kind.
    fn arm(&mut self, kind: InterruptKind, eventfds: &[BorrowedFd<'_>]) -> Result<(), DeviceError>;

    /// Disarms all interrupts of a kind. Disarming what is not armed is no error.
    fn disarm(&mut self, kind: InterruptKind) -> Result<(), DeviceError>;
}

/// Signals an eventfd of somebody else's without waiting for them.
///
/// A counter that is full is signalled already, and a write to it would block until its owner reads, which an owner who
/// means ill never does; the kernel's own signalling saturates in the same way. Its owner can still fill it between the
/// look and the write, in which case they hold up the one device that they have attached to.
pub(crate) fn signal(eventfd: BorrowedFd<'_>) -> std::io::Result<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut writable = [PollFd::from_borrowed_fd(eventfd, PollFlags::OUT)];
    if poll(&mut writable, Some(&Timespec::default()))? > 0 && writable[0].revents().contains(PollFlags::OUT)
    {
        rustix::io::write(eventfd, &1_u64.to_ne_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use rustix::event::{EventfdFlags, eventfd};

    use super::*;

    fn count(fd: BorrowedFd<'_>) -> u64 {
        let mut count = [0; 8];
        rustix::io::read(fd, &mut count).unwrap();
        u64::from_ne_bytes(count)
    }

    #[test]
    fn a_full_eventfd_is_not_waited_for() {
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        signal(fd.as_fd()).unwrap();
        assert_eq!(count(fd.as_fd()), 1);
        let full = u64::MAX - 1;
        rustix::io::write(&fd, &full.to_ne_bytes()).unwrap();
        signal(fd.as_fd()).unwrap();
        assert_eq!(count(fd.as_fd()), full);
    }
}
