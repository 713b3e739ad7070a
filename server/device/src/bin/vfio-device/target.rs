//! From a device's name on the command line to an opened device on its lane.

use std::sync::Arc;

use vfio_checkpoint_device::kernel::discovery::{Blocker, Discovered, PciAddress, SysRoots, find};
use vfio_checkpoint_device::kernel::{KernelDevice, KernelPath, OpenOptions, facts};
use vfio_checkpoint_device::lane::DEFAULT_CALL_LIMIT;
use vfio_checkpoint_device::sim::{SimConfig, SimDevice, Workload};
use vfio_checkpoint_device::{
    Clock, DeviceLane, Driver, Fingerprint, Identity, MigrationDevice, Threads, chain,
};

use crate::args::Common;
use crate::failure::CommandFailure;

/// A device that was named and not opened yet.
pub(crate) enum Target {
    Kernel { name: String, path: Option<KernelPath> },
    Sim(SimDevice),
}

/// An opened device. The slot of a simulated one comes along: its digest proves a restore.
pub(crate) struct Opened {
    pub(crate) lane: DeviceLane,
    pub(crate) sim: Option<SimDevice>,
}

impl Target {
    pub(crate) fn parse(name: &str, common: &Common) -> Result<Self, CommandFailure> {
        let sim = name.strip_prefix("sim").and_then(|rest| match rest.strip_prefix(':') {
            Some(settings) => Some(settings),
            None => rest.is_empty().then_some(""),
        });
        match sim {
            Some(settings) => {
                let clock: Arc<dyn Clock> = Arc::new(Threads::new());
                let device = SimDevice::new(sim_config(settings)?, clock).map_err(CommandFailure::blocked)?;
                Ok(Self::Sim(device))
            }
            None => Ok(Self::Kernel { name: name.to_owned(), path: common.via.map(Into::into) }),
        }
    }

    /// Which device it is, without opening it.
    pub(crate) fn identity(&self) -> Result<Identity, CommandFailure> {
        match self {
            Self::Kernel { name, .. } => {
                let device = check(name)?;
                facts::identity(&device)
                    .ok_or_else(|| CommandFailure::blocked(format!("{name} is bound to no driver")))
            }
            Self::Sim(device) => Ok(device.identity().clone()),
        }
    }

    /// Whether the kernel resets the device when its last holder closes it, as far as its name tells: it does a PCI
    /// function.
    pub(crate) fn resets_on_last_close(&self) -> bool {
        match self {
            Self::Kernel { name, .. } => name.parse::<PciAddress>().is_ok(),
            Self::Sim(_) => false,
        }
    }

    /// What must match for state to load, without opening the device.
    pub(crate) fn fingerprint(&self) -> Result<Fingerprint, CommandFailure> {
        match self {
            Self::Kernel { name, .. } => find(&SysRoots::default(), name)
                .map(|device| facts::fingerprint(&device))
                .map_err(|error| CommandFailure::blocked(chain(&error))),
            Self::Sim(device) => {
                let handle = device.open().map_err(|error| CommandFailure::blocked(chain(&error)))?;
                Ok(handle.fingerprint().clone())
            }
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
        };
        let lane = DeviceLane::new(Driver::new(device), Arc::new(Threads::new()), DEFAULT_CALL_LIMIT)
            .map_err(|error| CommandFailure::failed(&error))?;
        Ok(Opened { lane, sim })
    }
}

/// Everything that stands in the way, told at once.
fn check(name: &str) -> Result<Discovered, CommandFailure> {
    let device = find(&SysRoots::default(), name).map_err(|error| CommandFailure::blocked(chain(&error)))?;
    let blockers: Vec<String> = device.blockers().iter().map(Blocker::to_string).collect();
    if blockers.is_empty() { Ok(device) } else { Err(CommandFailure::blocked(blockers.join("\n  "))) }
}

fn sim_config(settings: &str) -> Result<SimConfig, CommandFailure> {
    let mut config = SimConfig::default();
    for setting in settings.split(',').filter(|setting| !setting.is_empty()) {
        let refuse = |why: &str| CommandFailure::blocked(format!("simulated device: {setting:?}: {why}"));
        let (key, value) = setting.split_once('=').ok_or_else(|| refuse("give KEY=VALUE"))?;
        match key {
            "seed" => config.seed = value.parse().map_err(|_| refuse("give a whole number"))?,
            "memory" => config.memory_bytes = size(value).ok_or_else(|| refuse(SIZE))?,
            "dirty" => {
                let dirty_bytes_per_second = size(value).ok_or_else(|| refuse(SIZE))?;
                config.workload = Workload { dirty_bytes_per_second, ..config.workload };
            }
            "firmware" => value.clone_into(&mut config.firmware),
            _ => return Err(refuse("there are seed, memory, dirty and firmware")),
        }
    }
    Ok(config)
}

const SIZE: &str = "give bytes, or a number with the suffix KiB, MiB or GiB";

fn size(text: &str) -> Option<u64> {
    let (number, unit) = [("KiB", 10), ("MiB", 20), ("GiB", 30)]
        .into_iter()
        .find_map(|(suffix, shift)| Some((text.strip_suffix(suffix)?, 1_u64 << shift)))
        .unwrap_or((text, 1));
    number.parse::<u64>().ok()?.checked_mul(unit)
}
