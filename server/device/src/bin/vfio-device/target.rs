//! From a device's name on the command line to an opened device on its lane.

use std::sync::Arc;

use vfio_checkpoint_device::address::{Access, AddressBlocker, DeviceAddress, Opened as Open};
use vfio_checkpoint_device::kernel::discovery::{DeviceName, SysRoots, find};
use vfio_checkpoint_device::kernel::facts;
use vfio_checkpoint_device::lane::DEFAULT_CALL_LIMIT;
use vfio_checkpoint_device::sim::{SimConfig, SimDevice};
use vfio_checkpoint_device::{DeviceLane, Driver, Fingerprint, Identity, Threads, chain};

use crate::args::Common;
use crate::failure::CommandFailure;

/// A device that was named.
pub(crate) struct Target {
    address: DeviceAddress,
    access: Option<Access>,
    /// Opened already, because it was asked something that only an open device tells. A device process that is hung up
    /// on in between might reset its device.
    open: Option<Open>,
}

/// An opened device. The slot of a simulated one comes along: its digest proves a restore.
pub(crate) struct Opened {
    pub(crate) lane: DeviceLane,
    pub(crate) sim: Option<SimDevice>,
}

impl Target {
    pub(crate) fn parse(name: &str, common: &Common) -> Result<Self, CommandFailure> {
        let address = name.parse().map_err(|error| CommandFailure::blocked(chain(&error)))?;
        let access = Access { path: common.via.map(Into::into), ..Access::default() };
        Ok(Self { address, access: Some(access), open: None })
    }

    /// Which device it is. A kernel device is not opened for it; of the others, only they know.
    pub(crate) fn identity(&mut self) -> Result<Identity, CommandFailure> {
        if let DeviceAddress::Kernel(name) = &self.address {
            let blockers = self.address.blockers(&SysRoots::default());
            if !blockers.is_empty() {
                let told: Vec<String> = blockers.iter().map(AddressBlocker::to_string).collect();
                return Err(CommandFailure::blocked(told.join("\n  ")));
            }
            return find(&SysRoots::default(), &name.to_string())
                .map_err(|error| CommandFailure::blocked(chain(&error)))
                .map(|device| facts::identity(&device))?
                .ok_or_else(|| CommandFailure::blocked(format!("{name} is bound to no driver")));
        }
        Ok(self.peek()?.device.identity().clone())
    }

    /// Whether the device is likely reset when its last holder closes it, as far as its name tells: a PCI function is.
    pub(crate) fn resets_on_last_close(&self) -> bool {
        match &self.address {
            // Most device processes do, and none says whether it does.
            DeviceAddress::Kernel(DeviceName::Pci(_)) | DeviceAddress::VfioUser(_) => true,
            DeviceAddress::Kernel(DeviceName::Mdev(_)) | DeviceAddress::Sim(_) => false,
        }
    }

    /// What must match for state to load. A kernel device is not opened for it; of the others, only they know.
    pub(crate) fn fingerprint(&mut self) -> Result<Fingerprint, CommandFailure> {
        if let DeviceAddress::Kernel(name) = &self.address {
            return find(&SysRoots::default(), &name.to_string())
                .map(|device| facts::fingerprint(&device))
                .map_err(|error| CommandFailure::blocked(chain(&error)));
        }
        Ok(self.peek()?.device.fingerprint().clone())
    }

    /// Opens the device, once.
    fn peek(&mut self) -> Result<&Open, CommandFailure> {
        let open = self.take()?;
        Ok(self.open.insert(open))
    }

    fn take(&mut self) -> Result<Open, CommandFailure> {
        match self.open.take() {
            Some(open) => Ok(open),
            None => self
                .address
                .open(self.access.take().unwrap_or_default())
                .map_err(|error| CommandFailure::blocked(chain(&error))),
        }
    }

    /// Opens the device, which resets it; refused first where sysfs already shows that it cannot work.
    pub(crate) fn open(mut self) -> Result<Opened, CommandFailure> {
        let Open { device, sim, keepsake: _ } = self.take()?;
        let lane = DeviceLane::new(Driver::new(device), Arc::new(Threads::new()), DEFAULT_CALL_LIMIT)
            .map_err(|error| CommandFailure::failed(&error))?;
        Ok(Opened { lane, sim })
    }
}

/// The configuration of a simulated device, where the name is one's.
pub(crate) fn sim_config_of(name: &str) -> Option<Result<SimConfig, CommandFailure>> {
    let settings = SimConfig::spec_in_name(name)?;
    Some(SimConfig::from_spec(settings).map_err(|error| CommandFailure::blocked(chain(&error))))
}
