//! PCI configuration space and interrupts of a device process.
//!
//! ```text
//!   PCI_COMMAND   REGION_READ, REGION_WRITE of two bytes at 4 of the configuration region
//!   MSI, MSI-X    GET_IRQ_INFO how many; SET_IRQS with eventfds beside the message, as many at a time as the peer takes
//! ```
//!
//! # What is captured of interrupts
//! What this connection armed. A server serves one client and forgets what that armed when it goes, so there is no
//! other; the protocol has no way to ask.
//!
//! # Failure paths
//! Arming replaces: what was armed of that kind is disarmed first. If a later part of the arming fails, all of the kind
//! is disarmed again, so that it is never armed in part.

use std::os::fd::BorrowedFd;

use vfio_bindings::bindings::vfio as uapi;

use crate::config_space::MAX_VECTORS;
use crate::vfio_user::codec::{Code, Command, IRQ_INFO_BYTES, Reply, SetIrqs};
use crate::{Call, ConfigCapture, ConfigSpace, DeviceError, InterruptKind, PciCommand, Rearm};

use super::link::{Link, Shared, no_answer};

/// Offset of the command register.
const PCI_COMMAND: u64 = 4;
/// A configuration space that has less than the standard header is none.
pub(super) const HEADER_BYTES: u64 = 64;
/// The region that configuration space is.
pub(super) const REGION: u32 = uapi::VFIO_PCI_CONFIG_REGION_INDEX;

/// The configuration space of one device.
#[derive(Debug)]
pub(super) struct RemoteConfigSpace {
    shared: Shared,
    armed: Option<Rearm>,
}

impl RemoteConfigSpace {
    pub(super) fn new(shared: Shared) -> Self {
        Self { shared, armed: None }
    }

    fn set_irqs(
        link: &mut Link,
        kind: InterruptKind,
        start: u32,
        eventfds: &[BorrowedFd<'_>],
    ) -> Result<(), DeviceError> {
        let data =
            if eventfds.is_empty() { uapi::VFIO_IRQ_SET_DATA_NONE } else { uapi::VFIO_IRQ_SET_DATA_EVENTFD };
        let flags = data | uapi::VFIO_IRQ_SET_ACTION_TRIGGER;
        let count = u32::try_from(eventfds.len()).unwrap_or(u32::MAX);
        let command = Command::SetIrqs(SetIrqs { flags, index: index(kind), start, count, data: &[] });
        link.order(Call::SetIrqs, &command, eventfds)
    }

    fn vectors(link: &mut Link, kind: InterruptKind) -> Result<u32, DeviceError> {
        let command = Command::GetIrqInfo { argsz: IRQ_INFO_BYTES, index: index(kind) };
        let count = link.ask(Call::SetIrqs, &command, &[], |reply| {
            let Reply::IrqInfo(info) = reply else { return Err("it carries no interrupt info") };
            Ok(info.count)
        });
        match count {
            Ok(count) => Ok(count.min(MAX_VECTORS)),
            Err(error) if does_not_know(&error) => Ok(0),
            Err(error) => Err(error),
        }
    }
}

fn index(kind: InterruptKind) -> u32 {
    match kind {
        InterruptKind::Msi => uapi::VFIO_PCI_MSI_IRQ_INDEX,
        InterruptKind::MsiX => uapi::VFIO_PCI_MSIX_IRQ_INDEX,
    }
}

/// A server that does not know a kind of interrupt, or has none of it armed.
fn does_not_know(error: &DeviceError) -> bool {
    matches!(error, DeviceError::Os { source, .. }
        if matches!(source.raw_os_error(), Some(libc::EINVAL | libc::ENOTTY)))
}

/// Reads two bytes of configuration space.
pub(super) fn read_u16(link: &mut Link, call: Call, offset: u64) -> Result<u16, DeviceError> {
    let command = Command::RegionRead { region: REGION, offset, count: 2 };
    link.ask(call, &command, &[], |reply| {
        let Reply::RegionRead { data, .. } = reply else { return Err("it carries no data") };
        data.try_into().map(u16::from_le_bytes).map_err(|_| "it carries another length than was asked for")
    })
}

impl ConfigSpace for RemoteConfigSpace {
    fn capture(&mut self) -> Result<ConfigCapture, DeviceError> {
        Ok(ConfigCapture { command: self.command()?, interrupts: self.armed })
    }

    fn command(&mut self) -> Result<PciCommand, DeviceError> {
        read_u16(&mut self.shared.lock(), Call::ConfigRead, PCI_COMMAND).map(PciCommand)
    }

    fn set_command(&mut self, command: PciCommand) -> Result<(), DeviceError> {
        let register = command.0.to_le_bytes();
        let write = Command::RegionWrite { region: REGION, offset: PCI_COMMAND, data: &register };
        let taken = self.shared.lock().ask(Call::ConfigWrite, &write, &[], |reply| {
            // A bare header: done.
            let Reply::RegionWrite { count, .. } = reply else { return Ok(2) };
            Ok(count)
        })?;
        if taken == 2 {
            return Ok(());
        }
        Err(no_answer(Call::ConfigWrite, Code::RegionWrite, "it took another length than was given"))
    }

    fn arm(&mut self, kind: InterruptKind, eventfds: &[BorrowedFd<'_>]) -> Result<(), DeviceError> {
        let vectors = Self::vectors(&mut self.shared.lock(), kind)?;
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
        let shared = self.shared.clone();
        let mut link = shared.lock();
        let portion = link.connection().fds_per_message().max(1);
        let mut start = 0;
        for part in eventfds.chunks(portion) {
            if let Err(error) = Self::set_irqs(&mut link, kind, start, part) {
                if let Err(error) = Self::set_irqs(&mut link, kind, 0, &[]) {
                    tracing::debug!(%error, "disarming what was armed in part");
                }
                return Err(error);
            }
            start = start.saturating_add(u32::try_from(part.len()).unwrap_or(u32::MAX));
        }
        self.armed = Some(Rearm { kind, vectors: asked });
        Ok(())
    }

    fn disarm(&mut self, kind: InterruptKind) -> Result<(), DeviceError> {
        match Self::set_irqs(&mut self.shared.lock(), kind, 0, &[]) {
            Err(error) if does_not_know(&error) => {}
            other => other?,
        }
        if self.armed.is_some_and(|armed| armed.kind == kind) {
            self.armed = None;
        }
        Ok(())
    }
}
