//! The PCI function that a client sees: 256 bytes of configuration space, and BAR 0 where there is MSI-X.
//!
//! ```text
//!   0x00  type 0 header      PCI_COMMAND is the device's own, live
//!   0x40  MSI                where the device has vectors of it; enabled as the device says
//!   0x50  MSI-X              likewise; table and pending bits lie in BAR 0
//!
//!   BAR 0   memory, 32-bit:  vectors x 16 bytes of table | pending bits      sized to a power of two
//! ```
//!
//! A device behind [`ConfigSpace`] shows its command register and what is armed, and nothing else of a configuration
//! space, so the rest is made here. The MSI-X table is plain memory that reads as it was written: a VMM keeps the
//! guest's vectors itself and arms them with `SET_IRQS`, as with a kernel device, and the enable bits only show it.
//!
//! # Invariants
//! - No access reaches past the end of a region: what does is EINVAL and changes nothing.
//! - The enable bits cannot be written.

use rustix::io::Errno;

use super::errno;
use crate::config_space::MAX_VECTORS;
use crate::{ConfigSpace, InterruptKind, PciCommand};

/// Size of the configuration space of a conventional function.
pub(super) const CONFIG_BYTES: usize = 256;
/// Smallest size of BAR 0: a page, so that a VMM can map it by itself.
const MIN_BAR_BYTES: usize = 4096;

const COMMAND: usize = 0x04;
const BAR0: usize = 0x10;
const MSI: usize = 0x40;
const MSIX: usize = 0x50;
/// Offset of the message control register in the capabilities of both kinds.
const CONTROL: usize = 2;

/// What kind of PCI function a server presents. The device itself does not say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PciFunction {
    /// Vendor.
    pub vendor_id: u16,
    /// Device, by its vendor's numbers.
    pub device_id: u16,
    /// Base class, sub-class and programming interface, from the high byte down.
    pub class: u32,
    /// Vectors of MSI: 0, or a power of two up to 32. Others are rounded down.
    pub msi_vectors: u32,
    /// Vectors of MSI-X: up to 2048, more count as that.
    pub msix_vectors: u32,
}

impl Default for PciFunction {
    /// An unspecified device of a vendor number that is nobody's, with as many vectors as a simulated device has.
    fn default() -> Self {
        Self { vendor_id: 0x1234, device_id: 0x5646, class: 0xff_00_00, msi_vectors: 32, msix_vectors: 64 }
    }
}

impl PciFunction {
    /// How many vectors of a kind the function has.
    pub(super) fn vectors(&self, kind: InterruptKind) -> u32 {
        match kind {
            InterruptKind::Msi => self.msi_vectors.min(32).checked_ilog2().map_or(0, |bits| 1 << bits),
            InterruptKind::MsiX => self.msix_vectors.min(MAX_VECTORS),
        }
    }
}

/// The registers of a function.
#[derive(Debug)]
pub(super) struct PciRegisters {
    function: PciFunction,
    /// As they read, but for what is the device's.
    config: [u8; CONFIG_BYTES],
    /// Which bits can be written.
    writable: [u8; CONFIG_BYTES],
    bar0: Vec<u8>,
}

impl PciRegisters {
    pub(super) fn new(function: PciFunction) -> Self {
        let (msi, msix) = (function.vectors(InterruptKind::Msi), function.vectors(InterruptKind::MsiX));
        let mut registers = Self {
            function,
            config: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            bar0: vec![0; bar_bytes(msix)],
        };
        registers.set(0x00, &function.vendor_id.to_le_bytes());
        registers.set(0x02, &function.device_id.to_le_bytes());
        registers.set(0x09, &function.class.to_le_bytes()[..3]);
        registers.set(0x2c, &function.vendor_id.to_le_bytes());
        registers.set(0x2e, &function.device_id.to_le_bytes());
        // Cache line size, latency timer and interrupt line are the system's notes.
        registers.allow(0x0c, &[0xff, 0xff]);
        registers.allow(0x3c, &[0xff]);
        if !registers.bar0.is_empty() {
            // At most 64 KiB. The low bits that cannot be written tell the size.
            let size = u32::try_from(registers.bar0.len()).unwrap_or(0);
            registers.allow(BAR0, &(!(size.wrapping_sub(1))).to_le_bytes());
        }
        let mut link = 0x34;
        if msi > 0 {
            registers.link(&mut link, MSI);
            // 64-bit addresses; how many vectors can be asked for, as a power of two.
            let control = 1 << 7 | u16::try_from(msi.ilog2()).unwrap_or(0) << 1;
            registers.set(MSI, &[0x05]);
            registers.set(MSI + CONTROL, &control.to_le_bytes());
            // How many are granted, the message's address and its data.
            registers.allow(MSI + CONTROL, &[0x70]);
            registers.allow(MSI + 4, &[0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        }
        if msix > 0 {
            registers.link(&mut link, MSIX);
            registers.set(MSIX, &[0x11]);
            registers.set(MSIX + CONTROL, &u16::try_from(msix - 1).unwrap_or(0).to_le_bytes());
            // The whole function can be masked.
            registers.allow(MSIX + CONTROL + 1, &[0x40]);
            // The table is at the start of BAR 0, the pending bits behind it.
            registers.set(MSIX + 8, &(msix * 16).to_le_bytes());
        }
        registers
    }

    /// How many vectors of a kind the function has.
    pub(super) fn vectors(&self, kind: InterruptKind) -> u32 {
        self.function.vectors(kind)
    }

    /// Size of BAR 0, 0 where there is none.
    pub(super) fn bar0_bytes(&self) -> u64 {
        self.bar0.len() as u64
    }

    pub(super) fn read_config(
        &self,
        space: &mut dyn ConfigSpace,
        offset: u64,
        into: &mut [u8],
    ) -> Result<(), Errno> {
        let at = within(CONFIG_BYTES, offset, into.len())?;
        let captured = space.capture().map_err(|error| errno::of(&error))?;
        let mut image = self.config;
        image[COMMAND..COMMAND + 2].copy_from_slice(&captured.command.0.to_le_bytes());
        match captured.interrupts.map(|armed| armed.kind) {
            Some(InterruptKind::Msi) => image[MSI + CONTROL] |= 0x01,
            Some(InterruptKind::MsiX) => image[MSIX + CONTROL + 1] |= 0x80,
            None => {}
        }
        into.copy_from_slice(&image[at..at + into.len()]);
        Ok(())
    }

    pub(super) fn write_config(
        &mut self,
        space: &mut dyn ConfigSpace,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), Errno> {
        let at = within(CONFIG_BYTES, offset, bytes.len())?;
        if at < COMMAND + 2 && at + bytes.len() > COMMAND {
            let mut command = space.command().map_err(|error| errno::of(&error))?.0.to_le_bytes();
            for (register, byte) in (at..).zip(bytes) {
                if let Some(half) = register.checked_sub(COMMAND).and_then(|half| command.get_mut(half)) {
                    *half = *byte;
                }
            }
            let command = PciCommand(u16::from_le_bytes(command));
            space.set_command(command).map_err(|error| errno::of(&error))?;
        }
        for (register, byte) in (at..).zip(bytes) {
            let writable = self.writable[register];
            self.config[register] = (self.config[register] & !writable) | (byte & writable);
        }
        Ok(())
    }

    pub(super) fn read_bar0(&self, offset: u64, into: &mut [u8]) -> Result<(), Errno> {
        let at = within(self.bar0.len(), offset, into.len())?;
        into.copy_from_slice(&self.bar0[at..at + into.len()]);
        Ok(())
    }

    pub(super) fn write_bar0(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        let at = within(self.bar0.len(), offset, bytes.len())?;
        self.bar0[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn set(&mut self, at: usize, bytes: &[u8]) {
        self.config[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// Appends a capability to the list, of which `link` is the place of the last pointer.
    fn link(&mut self, link: &mut usize, at: usize) {
        // Capabilities lie in the 256 bytes. Status says that there is a list.
        self.config[*link] = u8::try_from(at).unwrap_or(0);
        self.config[0x06] |= 1 << 4;
        *link = at + 1;
    }
}

/// Table and pending bits, rounded up to what a BAR can be.
fn bar_bytes(msix: u32) -> usize {
    let vectors = usize::try_from(msix).unwrap_or(0);
    if vectors == 0 {
        0
    } else {
        (vectors * 16 + vectors.div_ceil(64) * 8).next_power_of_two().max(MIN_BAR_BYTES)
    }
}

/// Where an access begins, if all of it lies within `size` bytes.
fn within(size: usize, offset: u64, length: usize) -> Result<usize, Errno> {
    let at = usize::try_from(offset).map_err(|_| Errno::INVAL)?;
    if at.checked_add(length).is_some_and(|end| end <= size) { Ok(at) } else { Err(Errno::INVAL) }
}
