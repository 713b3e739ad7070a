//! From a device's name on the command line to an opened device.

use std::fs;
use std::sync::Arc;

use vfio_checkpoint_device::kernel::discovery::{Blocker, SysRoots, find};
use vfio_checkpoint_device::kernel::{KernelDevice, OpenOptions};
use vfio_checkpoint_device::sim::{SimConfig, SimDevice};
use vfio_checkpoint_device::vfio_user::server::PciFunction;
use vfio_checkpoint_device::{InterruptKind, MigrationDevice, Threads, chain};

/// A device to serve.
pub(crate) struct Served {
    pub(crate) device: Box<dyn MigrationDevice>,
    /// What clients see of it.
    pub(crate) function: PciFunction,
}

/// Opens the device that is named. The error is for people.
pub(crate) fn open(name: &str) -> Result<Served, String> {
    match SimConfig::spec_in_name(name) {
        Some(settings) => simulated(settings),
        None => kernel(name),
    }
}

fn simulated(settings: &str) -> Result<Served, String> {
    let config = SimConfig::from_spec(settings).map_err(|error| chain(&error))?;
    let vectors = config.pci.map_or((0, 0), |pci| (pci.msi_vectors, pci.msix_vectors));
    let function = PciFunction { msi_vectors: vectors.0, msix_vectors: vectors.1, ..PciFunction::default() };
    let slot = SimDevice::new(config, Arc::new(Threads::new())).map_err(|error| chain(&error))?;
    let device = Box::new(slot.open().map_err(|error| chain(&error))?);
    Ok(Served { device, function })
}

/// Refused first where sysfs already shows that it cannot work.
fn kernel(name: &str) -> Result<Served, String> {
    let found = find(&SysRoots::default(), name).map_err(|error| chain(&error))?;
    let blockers: Vec<String> = found.blockers().iter().map(Blocker::to_string).collect();
    if !blockers.is_empty() {
        return Err(blockers.join("\n  "));
    }
    let device = KernelDevice::open(name, &OpenOptions::default()).map_err(|error| chain(&error))?;
    let default = PciFunction::default();
    let id = |file| number(name, file).and_then(|number| u16::try_from(number).ok());
    let vectors = |kind| device.opened().vectors(kind).map_err(|error| chain(&error));
    let function = PciFunction {
        vendor_id: id("vendor").unwrap_or(default.vendor_id),
        device_id: id("device").unwrap_or(default.device_id),
        class: number(name, "class").unwrap_or(default.class),
        msi_vectors: vectors(InterruptKind::Msi)?,
        msix_vectors: vectors(InterruptKind::MsiX)?,
    };
    Ok(Served { device: Box::new(device), function })
}

/// A hexadecimal number in sysfs, where the device is a PCI function.
fn number(name: &str, file: &str) -> Option<u32> {
    let text = fs::read_to_string(format!("/sys/bus/pci/devices/{name}/{file}")).ok()?;
    u32::from_str_radix(text.trim().strip_prefix("0x")?, 16).ok()
}
