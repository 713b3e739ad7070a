//! An opened kernel device: any VFIO device first, a migratable one once the driver said so.
//!
//! ```text
//!   open(name)  -----\                         /--> KernelDevice: MigrationDevice
//!                     +--> OpenDevice --into_migratable
//!   from_fds(fds) ---/         |               \--> CannotMigrate: the device, and why
//!                      config space, interrupts, DMA mappings, reset
//! ```
//!
//! # Invariants
//! - Adopting, probing and dropping change no state of the device: nothing is reset, detached or disarmed.
//! - What the device can do is asked of the device, once.
//! - Fds that cannot be used come back to the caller: closing the last duplicate would reset the device.
//!
//! # Failure paths
//! Every call reports the kernel's errno and nothing else; recovering is the caller's. An absent feature (ENOTTY on
//! old kernels, EINVAL from other drivers) is normal and said at debug level.

use std::io;
use std::os::fd::AsFd;

use vfio_bindings::bindings::vfio as uapi;
use vfio_checkpoint_fsm::{Capabilities, State};

use super::config_space::ConfigRegion;
use super::discovery::{self, SysRoots};
use super::dma::{DmaMapping, DmaMemory};
use super::facts;
use super::fds::KernelFds;
use super::open::{self, OpenOptions};
use super::open_error::{AdoptError, NotMigratable, OpenError};
use super::quirks::{self, HEADER_ROOM_BYTES, Quirk};
use super::stream::{RestoreFd, SaveFd};
use super::sys::{self, Direction};
use crate::{
    Call, ConfigSpace, DataSize, DataStream, DeviceCapabilities, DeviceError, DmaLog, Fingerprint, Identity,
    IovaRange, MigrationDevice, Rearm,
};

/// An opened VFIO device, whether or not it can migrate.
#[derive(Debug)]
pub struct OpenDevice {
    identity: Identity,
    fingerprint: Fingerprint,
    fds: KernelFds,
    announces_reset: bool,
    config: Option<ConfigRegion>,
    /// What this handle armed last, if it is armed still.
    armed: Option<Rearm>,
}

impl OpenDevice {
    /// Opens a device by its name: a PCI address, or an mdev's UUID. **This resets it.**
    pub fn open(name: &str, options: &OpenOptions) -> Result<Self, OpenError> {
        let device = discovery::find(&options.roots, name)?;
        let Some(identity) = facts::identity(&device) else {
            return Err(OpenError::NotBoundToVfio { name: name.to_owned(), driver: None });
        };
        let fds = open::open(&device, options)?;
        Self::adopt(fds, identity, facts::fingerprint(&device)).map_err(|refused| refused.source)
    }

    /// Takes over a device that is open and attached already, for example from the process that held it or from
    /// the workload that lends it. What must match elsewhere is read from sysfs under the identity's name; nobody
    /// checks that the fds are that device's.
    pub fn from_fds(fds: KernelFds, identity: Identity) -> Result<Self, AdoptError> {
        match discovery::find(&SysRoots::default(), &identity.name) {
            Ok(device) => Self::adopt(fds, identity, facts::fingerprint(&device)),
            Err(source) => Err(AdoptError { fds, source: source.into() }),
        }
    }

    fn adopt(fds: KernelFds, identity: Identity, fingerprint: Fingerprint) -> Result<Self, AdoptError> {
        // mtty serves its interrupt requests only after it was asked for this info once.
        let info = match sys::device_info(fds.device.as_fd()) {
            Ok(info) => info,
            Err(source) => {
                let doing = "asking what kind of device it is";
                return Err(AdoptError { fds, source: OpenError::Os { name: identity.name, doing, source } });
            }
        };
        let has = |flag| info.flags & flag != 0;
        let config = has(uapi::VFIO_DEVICE_FLAGS_PCI).then(|| ConfigRegion::of(fds.device.as_fd())).flatten();
        let announces_reset = has(uapi::VFIO_DEVICE_FLAGS_RESET);
        Ok(Self { identity, fingerprint, fds, announces_reset, config, armed: None })
    }

    /// Asks the driver for migration. A device that cannot comes back, opened as it was.
    pub fn into_migratable(self) -> Result<KernelDevice, CannotMigrate> {
        match self.probe() {
            Ok(capabilities) => Ok(KernelDevice { device: self, capabilities }),
            Err(source) => Err(CannotMigrate { device: Box::new(self), source }),
        }
    }

    fn probe(&self) -> Result<DeviceCapabilities, NotMigratable> {
        let driver = || self.identity.driver.clone();
        let flags = match sys::migration_flags(self.fds.device.as_fd()) {
            Ok(flags) => flags,
            Err(source) if is_absence(&source) => {
                tracing::debug!(device = %self.identity, errno = %source, "no migration");
                return Err(NotMigratable::Absent { driver: driver(), source });
            }
            Err(source) => return Err(NotMigratable::Probe { driver: driver(), source }),
        };
        let migration = Capabilities::from_kernel_flags(flags)
            .map_err(|source| NotMigratable::Flags { driver: driver(), source })?;
        Ok(DeviceCapabilities {
            migration,
            reset: self.announces_reset || quirks::has(&self.identity.driver, Quirk::ResetsUnannounced),
            data_size: self.has(uapi::VFIO_DEVICE_FEATURE_MIG_DATA_SIZE, Direction::Get),
            precopy_reinit: migration.pre_copy
                && self.present("pre-copy info v2", sys::opt_in_to_precopy_info_v2(self.fds.device.as_fd())),
            dma_logging: self.has(uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_START, Direction::Set)
                && self.has(uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_REPORT, Direction::Get)
                && self.has(uapi::VFIO_DEVICE_FEATURE_DMA_LOGGING_STOP, Direction::Set),
            config_space: self.config.is_some(),
        })
    }

    fn has(&self, feature: u32, direction: Direction) -> bool {
        self.present("feature", sys::probe(self.fds.device.as_fd(), feature, direction))
    }

    /// An optional feature that could not be had is absent, whatever the errno; what it was goes to the log.
    fn present(&self, what: &'static str, answer: io::Result<()>) -> bool {
        answer.inspect_err(|error| tracing::debug!(device = %self.identity, what, %error, "absent")).is_ok()
    }

    /// Which device this is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What must match on another device for this one's state to load there.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// The fds, to look at or to pass on by reference.
    pub fn fds(&self) -> &KernelFds {
        &self.fds
    }

    /// Attaches the device to another address space of its iommufd: see [`KernelFds::attach`].
    pub fn attach(&mut self, to_ioas_id: u32) -> io::Result<()> {
        self.fds.attach(to_ioas_id)
    }

    /// Takes the device out of its address space, for every holder of its file: see [`KernelFds::detach`].
    pub fn detach(&mut self) -> io::Result<()> {
        self.fds.detach()
    }

    /// Duplicates of all fds, to lend to a workload or to have held.
    pub fn duplicate_fds(&self) -> io::Result<KernelFds> {
        self.fds.duplicate()
    }

    /// Gives the fds up, to hand the device back. The device stays as it is.
    pub fn into_fds(self) -> KernelFds {
        self.fds
    }

    /// Resets the device.
    ///
    /// Asked of the kernel whatever the device's flags say: mtty resets without announcing it.
    pub fn reset(&mut self) -> Result<(), DeviceError> {
        sys::reset(self.fds.device.as_fd()).map_err(|source| DeviceError::os(Call::Reset, source))
    }

    /// The PCI configuration space, where the device is a PCI function.
    pub fn config_space(&mut self) -> Option<&mut dyn ConfigSpace> {
        self.config.is_some().then_some(self as &mut dyn ConfigSpace)
    }

    /// Maps memory for the device's DMA at `iova`, which lies on a page. The memory is gone where that fails.
    pub fn map_dma(&self, iova: u64, memory: DmaMemory) -> Result<DmaMapping, DeviceError> {
        self.fds
            .attachment
            .space()
            .and_then(|space| memory.map(space, iova))
            .map_err(|source| DeviceError::os(Call::MapDma, source))
    }

    /// Takes away whatever is mapped for DMA in a range, also what another process mapped. The range must not cut
    /// a mapping in two. Returns the number of bytes taken away: a container says 0 where nothing was mapped, an
    /// iommufd ENOENT.
    pub fn unmap_dma(&self, range: IovaRange) -> Result<u64, DeviceError> {
        self.fds
            .attachment
            .space()
            .and_then(|space| space.unmap(range.start(), range.length_bytes()))
            .map_err(|source| DeviceError::os(Call::UnmapDma, source))
    }

    pub(super) fn config_region(&self) -> Option<ConfigRegion> {
        self.config
    }

    pub(super) fn remembered_armed(&self) -> Option<Rearm> {
        self.armed
    }

    pub(super) fn remember_armed(&mut self, armed: Option<Rearm>) {
        self.armed = armed;
    }
}

/// A device that was opened and cannot migrate.
#[derive(Debug, thiserror::Error)]
#[error("{} cannot migrate", device.identity)]
pub struct CannotMigrate {
    /// The device, open as it was.
    pub device: Box<OpenDevice>,
    /// Why it cannot.
    #[source]
    pub source: NotMigratable,
}

/// Whether an errno says that the kernel or the driver does not have what was asked for.
fn is_absence(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL))
}

/// An opened kernel device that speaks migration v2.
#[derive(Debug)]
pub struct KernelDevice {
    device: OpenDevice,
    capabilities: DeviceCapabilities,
}

impl KernelDevice {
    /// Opens a device by its name and asks it for migration. **This resets it.** A device that cannot migrate is
    /// closed again; to keep it, go through [`OpenDevice::into_migratable`].
    pub fn open(name: &str, options: &OpenOptions) -> Result<Self, OpenError> {
        OpenDevice::open(name, options)?
            .into_migratable()
            .map_err(|refused| OpenError::NotMigratable { name: name.to_owned(), source: refused.source })
    }

    /// Takes over a device that is open and attached already, as [`OpenDevice::from_fds`] does. Its migration state
    /// is left as it is: read it.
    pub fn from_fds(fds: KernelFds, identity: Identity) -> Result<Self, AdoptError> {
        OpenDevice::from_fds(fds, identity)?.into_migratable().map_err(|CannotMigrate { device, source }| {
            let name = device.identity.name.clone();
            AdoptError { fds: device.into_fds(), source: OpenError::NotMigratable { name, source } }
        })
    }

    /// The device below: its mappings and interrupts.
    pub fn opened(&self) -> &OpenDevice {
        &self.device
    }

    /// The device below, to change its attachment or its interrupts.
    pub fn opened_mut(&mut self) -> &mut OpenDevice {
        &mut self.device
    }

    /// The fds, to look at or to pass on by reference.
    pub fn fds(&self) -> &KernelFds {
        self.device.fds()
    }

    /// Duplicates of all fds, to lend to a workload or to have held.
    pub fn duplicate_fds(&self) -> io::Result<KernelFds> {
        self.device.duplicate_fds()
    }

    /// Gives the fds up, to hand the device back. The device stays as it is.
    pub fn into_fds(self) -> KernelFds {
        self.device.into_fds()
    }

    fn driver_has(&self, quirk: Quirk) -> bool {
        quirks::has(&self.device.identity.driver, quirk)
    }
}

impl MigrationDevice for KernelDevice {
    fn identity(&self) -> &Identity {
        self.device.identity()
    }

    fn fingerprint(&self) -> &Fingerprint {
        self.device.fingerprint()
    }

    fn capabilities(&self) -> &DeviceCapabilities {
        &self.capabilities
    }

    fn state(&mut self) -> Result<State, DeviceError> {
        let number = sys::migration_state(self.fds().device.as_fd())
            .map_err(|source| DeviceError::os(Call::GetState, source))?;
        Ok(State::try_from(number)?)
    }

    fn set_state(&mut self, target: State) -> Result<Option<DataStream>, DeviceError> {
        let data = sys::set_migration_state(self.fds().device.as_fd(), target.into())
            .map_err(|source| DeviceError::os(Call::SetState(target), source))?;
        // Only the last hop of a walk can open a stream: the kernel lets no walk pass through a state that has one.
        Ok(data.map(|fd| match target {
            State::Resuming => DataStream::Restore(Box::new(RestoreFd::new(fd))),
            State::Error
            | State::Stop
            | State::Running
            | State::StopCopy
            | State::RunningP2p
            | State::PreCopy
            | State::PreCopyP2p => {
                DataStream::Save(Box::new(SaveFd::new(fd, self.capabilities.precopy_reinit)))
            }
        }))
    }

    /// The driver's number, exact only where its driver is known for that and no pre-copy has handed part of the
    /// state out already: the number does not shrink with what is left.
    fn data_size(&mut self) -> Result<DataSize, DeviceError> {
        if !self.capabilities.data_size {
            return Ok(DataSize::Unknown);
        }
        let bytes = sys::migration_data_size(self.fds().device.as_fd())
            .map_err(|source| DeviceError::os(Call::DataSize, source))?;
        if self.driver_has(Quirk::SizeLeavesOutHeaders) {
            return Ok(DataSize::UpperBound(bytes.saturating_add(HEADER_ROOM_BYTES)));
        }
        if !self.driver_has(Quirk::SizeIsExact) {
            return Ok(DataSize::UpperBound(bytes));
        }
        Ok(match self.state()? {
            State::PreCopy | State::PreCopyP2p | State::StopCopy => DataSize::UpperBound(bytes),
            State::Error | State::Stop | State::Running | State::Resuming | State::RunningP2p => {
                DataSize::Known(bytes)
            }
        })
    }

    fn reset(&mut self) -> Result<(), DeviceError> {
        self.device.reset()
    }

    fn dma_log(&mut self) -> Option<&mut dyn DmaLog> {
        self.capabilities.dma_logging.then_some(self as &mut dyn DmaLog)
    }

    fn config_space(&mut self) -> Option<&mut dyn ConfigSpace> {
        self.device.config_space()
    }
}
