//! From a device's name on the command line to an opened device on its lane.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use vfio_checkpoint_device::kernel::discovery::{Blocker, Discovered, PciAddress, SysRoots, find};
use vfio_checkpoint_device::kernel::{KernelDevice, KernelPath, OpenOptions, facts};
use vfio_checkpoint_device::lane::DEFAULT_CALL_LIMIT;
use vfio_checkpoint_device::sim::{SimConfig, SimDevice};
use vfio_checkpoint_device::vfio_user::{ConnectOptions, VfioUserDevice};
use vfio_checkpoint_device::{
    Clock, DeviceLane, Driver, Fingerprint, Identity, MigrationDevice, Threads, chain,
};

use crate::args::Common;
use crate::failure::CommandFailure;

/// A device that was named and not opened yet.
pub(crate) enum Target {
    Kernel {
        name: String,
        path: Option<KernelPath>,
    },
    Sim(SimDevice),
    /// A device process, by its socket.
    VfioUser(PathBuf),
    /// The same once it was asked something: hanging up in between might reset the device.
    Connected(Box<VfioUserDevice>),
}

/// An opened device. The slot of a simulated one comes along: its digest proves a restore.
pub(crate) struct Opened {
    pub(crate) lane: DeviceLane,
    pub(crate) sim: Option<SimDevice>,
}

impl Target {
    pub(crate) fn parse(name: &str, common: &Common) -> Result<Self, CommandFailure> {
        if let Some(path) = name.strip_prefix("vfio-user:") {
            return Ok(Self::VfioUser(path.into()));
        }
        match sim_config_of(name) {
            Some(config) => {
                let config = config?;
                let clock: Arc<dyn Clock> = Arc::new(Threads::new());
                let device = SimDevice::new(config, clock).map_err(CommandFailure::blocked)?;
                Ok(Self::Sim(device))
            }
            None => Ok(Self::Kernel { name: name.to_owned(), path: common.via.map(Into::into) }),
        }
    }

    /// Which device it is, without opening it. A device process is connected to: it alone knows.
    pub(crate) fn identity(&mut self) -> Result<Identity, CommandFailure> {
        self.connect()?;
        match self {
            Self::Kernel { name, .. } => {
                let device = check(name)?;
                facts::identity(&device)
                    .ok_or_else(|| CommandFailure::blocked(format!("{name} is bound to no driver")))
            }
            Self::Sim(device) => Ok(device.identity().clone()),
            Self::VfioUser(path) => Ok(connect(path)?.identity().clone()),
            Self::Connected(device) => Ok(device.identity().clone()),
        }
    }

    /// Connects to a device process, once.
    fn connect(&mut self) -> Result<(), CommandFailure> {
        if let Self::VfioUser(path) = self {
            *self = Self::Connected(connect(path)?);
        }
        Ok(())
    }

    /// Whether the device is likely reset when its last holder closes it, as far as its name tells: a PCI function is.
    pub(crate) fn resets_on_last_close(&self) -> bool {
        match self {
            Self::Kernel { name, .. } => name.parse::<PciAddress>().is_ok(),
            Self::Sim(_) => false,
            // Most device processes do, and none says whether it does.
            Self::VfioUser(_) | Self::Connected(_) => true,
        }
    }

    /// What must match for state to load, without opening the device. A device process is connected to: it alone
    /// knows.
    pub(crate) fn fingerprint(&mut self) -> Result<Fingerprint, CommandFailure> {
        self.connect()?;
        match self {
            Self::Kernel { name, .. } => find(&SysRoots::default(), name)
                .map(|device| facts::fingerprint(&device))
                .map_err(|error| CommandFailure::blocked(chain(&error))),
            Self::Sim(device) => {
                let handle = device.open().map_err(|error| CommandFailure::blocked(chain(&error)))?;
                Ok(handle.fingerprint().clone())
            }
            Self::VfioUser(path) => Ok(connect(path)?.fingerprint().clone()),
            Self::Connected(device) => Ok(device.fingerprint().clone()),
        }
    }

    /// Opens the device, which resets it; refused first where sysfs already shows that it cannot work.
    pub(crate) fn open(self) -> Result<Opened, CommandFailure> {
        let (device, sim): (Box<dyn MigrationDevice>, _) = match self {
            Self::Kernel { name, path } => {
                check(&name)?;
                let options = OpenOptions { path, ..OpenOptions::default() };
                let device = KernelDevice::open(&name, &options)
                    .map_err(|error| CommandFailure::blocked(chain(&error)))?;
                (Box::new(device), None)
            }
            Self::Sim(device) => {
                let handle = device.open().map_err(|error| CommandFailure::blocked(chain(&error)))?;
                (Box::new(handle), Some(device))
            }
            Self::VfioUser(path) => (connect(&path)?, None),
            Self::Connected(device) => (device, None),
        };
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

fn connect(path: &Path) -> Result<Box<VfioUserDevice>, CommandFailure> {
    let connected = VfioUserDevice::connect(path, ConnectOptions::default());
    connected.map(Box::new).map_err(|error| CommandFailure::blocked(chain(&error)))
}

/// Everything that stands in the way, told at once.
fn check(name: &str) -> Result<Discovered, CommandFailure> {
    let device = find(&SysRoots::default(), name).map_err(|error| CommandFailure::blocked(chain(&error)))?;
    let blockers: Vec<String> = device.blockers().iter().map(Blocker::to_string).collect();
    if blockers.is_empty() { Ok(device) } else { Err(CommandFailure::blocked(blockers.join("\n  "))) }
}
