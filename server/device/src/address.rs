//! A device by its address: the one way from a name in a configuration or on a command line to an opened device.
//!
//! ```text
//!   "0000:03:00.1", an mdev's UUID  -> Kernel     \              blockers()   nothing is opened
//!   "sim", "sim:KEY=VALUE,..."      -> Sim         > DeviceAddress -- open() --> Opened { device, sim, keepsake }
//!   "vfio-user:PATH"                -> VfioUser   /              adopt(keepsake) --^
//! ```
//!
//! # Invariants
//! - An address prints as a text that parses to the same address. Nothing but a parsed address reaches a path.
//! - Looking at blockers opens nothing and connects to nobody. Opening resets a kernel device.
//! - Adopting resets and detaches nothing, and takes only what was kept of this very address.
//!
//! # Failure paths
//! [`AddressError`] for a text; [`OpenFailure`] for a device; [`AdoptFailure`] gives the keepsake back wherever the device
//! behind it is still as it was, because closing the last duplicate would reset it.

mod keepsake;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::keepsake::{Keepsake, KeepsakeError, KeepsakeKind};

use crate::kernel::discovery::{Blocker, DeviceName, DiscoveryError, InvalidName, SysRoots, find};
use crate::kernel::{AdoptError, KernelDevice, KernelPath, OpenError, OpenOptions};
use crate::sim::{SimConfig, SimConfigError, SimDevice, SimSpecError};
use crate::vfio_user::{ConnectError, ConnectOptions, Timing, VfioUserDevice};
use crate::{Clock, DeviceError, Identity, MigrationDevice, Threads};

const VFIO_USER: &str = "vfio-user:";
/// The longest text that is looked at.
const MAX_TEXT_BYTES: usize = 4096;
/// What the kernel takes as the path of a socket, its end left out.
const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Where a device is, as it is written in a configuration.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceAddress {
    /// A kernel VFIO device: a PCI function or an mdev.
    Kernel(DeviceName),
    /// A simulated device, which lives in this process.
    Sim(SimAddress),
    /// A device process, by its socket.
    VfioUser(SocketPath),
}

/// What a simulated device is like, in a text that is known to be right.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SimAddress {
    settings: String,
}

impl SimAddress {
    /// The configuration that the text describes.
    pub fn config(&self) -> Result<SimConfig, SimSpecError> {
        SimConfig::from_spec(&self.settings)
    }
}

/// The path of a device process' socket, which can be one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SocketPath {
    text: String,
}

impl SocketPath {
    /// The path.
    pub fn as_path(&self) -> &Path {
        Path::new(&self.text)
    }
}

/// The text is not a device's address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AddressError {
    /// It is longer than any address.
    #[error("a device's address has at most {MAX_TEXT_BYTES} bytes, this one has {bytes}")]
    TooLong {
        /// How long it is.
        bytes: usize,
    },
    /// It is no kernel device's name, nor anything else.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// What stands behind `sim:` describes no device.
    #[error(transparent)]
    Sim(#[from] SimSpecError),
    /// What stands behind `vfio-user:` can be no socket's path.
    #[error("vfio-user:{shown}: {reason}")]
    Socket {
        /// The beginning of the path.
        shown: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl FromStr for DeviceAddress {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        if text.len() > MAX_TEXT_BYTES {
            return Err(AddressError::TooLong { bytes: text.len() });
        }
        if let Some(path) = text.strip_prefix(VFIO_USER) {
            return socket_path(path).map(Self::VfioUser);
        }
        match SimConfig::spec_in_name(text) {
            Some(settings) => {
                let address = SimAddress { settings: settings.to_owned() };
                address.config()?;
                Ok(Self::Sim(address))
            }
            None => Ok(Self::Kernel(text.parse()?)),
        }
    }
}

fn socket_path(text: &str) -> Result<SocketPath, AddressError> {
    let reason = if text.is_empty() {
        "give the path of the socket behind the colon"
    } else if text.contains('\0') {
        "a path has no NUL"
    } else if text.len() > MAX_SOCKET_PATH_BYTES {
        "a socket's path has at most 107 bytes; move the socket to a shorter one"
    } else {
        return Ok(SocketPath { text: text.to_owned() });
    };
    Err(AddressError::Socket { shown: text.chars().take(64).collect(), reason })
}

impl fmt::Display for DeviceAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kernel(name) => name.fmt(f),
            Self::Sim(SimAddress { settings }) if settings.is_empty() => f.write_str("sim"),
            Self::Sim(SimAddress { settings }) => write!(f, "sim:{settings}"),
            Self::VfioUser(SocketPath { text }) => write!(f, "{VFIO_USER}{text}"),
        }
    }
}

impl From<DeviceAddress> for String {
    fn from(address: DeviceAddress) -> Self {
        address.to_string()
    }
}

impl TryFrom<String> for DeviceAddress {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

/// How to open or adopt a device.
#[derive(Debug)]
pub struct Access {
    /// The slot's name, for a backend that has none of its own: a simulated device or a device process. `None`: the
    /// backend's default.
    pub name: Option<String>,
    /// Which way to a kernel device. `None`: see [`OpenOptions::path`].
    pub path: Option<KernelPath>,
    /// Where the kernel shows itself.
    pub roots: SysRoots,
    /// Paces a simulated device.
    pub clock: Arc<dyn Clock>,
    /// How long agreeing with a device process may take.
    pub connect_within: Duration,
    /// How long a device process may take to finish what a dead owner of its connection asked for. Then its connection is
    /// closed, which costs its state. [`Duration::MAX`]: for ever.
    pub adopt_within: Duration,
    /// How long calls on a device process may take from then on.
    pub timing: Timing,
    /// Whether a [`Keepsake`] is made. It holds duplicates: while it lives, dropping the device is no last close.
    pub keep: bool,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            name: None,
            path: None,
            roots: SysRoots::default(),
            clock: Arc::new(Threads::new()),
            connect_within: Duration::from_secs(10),
            adopt_within: Duration::from_mins(1),
            timing: Timing::default(),
            keep: false,
        }
    }
}

/// An opened device.
#[derive(Debug)]
pub struct Opened {
    /// The device.
    pub device: Box<dyn MigrationDevice>,
    /// The slot of a simulated one: it outlives the handle, and can be opened again.
    pub sim: Option<SimDevice>,
    /// What a holder must keep, where [`Access::keep`] asked for it and the device does not live in this process.
    pub keepsake: Option<Keepsake>,
}

/// What is known to stand in the way of opening a device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddressBlocker {
    /// The kernel does not show the device.
    #[error(transparent)]
    NotFound(#[from] DiscoveryError),
    /// What sysfs shows of it.
    #[error("{0}")]
    Kernel(Blocker),
    /// Nothing is at the socket's path.
    #[error("{}: there is no socket; start the device process, or correct the path", path.display())]
    NoSocket {
        /// The path.
        path: PathBuf,
        /// What the system answered.
        #[source]
        source: io::Error,
    },
    /// Something else is at the socket's path.
    #[error("{} is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
}

/// Why a device could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenFailure {
    /// It would not work; it was not tried.
    #[error("{}", list(.0))]
    Blocked(Vec<AddressBlocker>),
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] OpenError),
    /// The text of a simulated device.
    #[error(transparent)]
    SimSpec(#[from] SimSpecError),
    /// The configuration of a simulated device.
    #[error(transparent)]
    SimConfig(#[from] SimConfigError),
    /// A simulated device.
    #[error(transparent)]
    Sim(#[from] DeviceError),
    /// A device process.
    #[error(transparent)]
    VfioUser(#[from] ConnectError),
    /// The device was opened, no duplicates of its fds could be made, and it was closed again.
    #[error(
        "the fds of {address} cannot be duplicated for a holder; raise this process' limit of open files"
    )]
    Keep {
        /// The device.
        address: DeviceAddress,
        /// Why not.
        #[source]
        source: io::Error,
    },
}

impl OpenFailure {
    /// Whether the device is there and has no migration: trying again cannot help.
    pub fn is_not_migratable(&self) -> bool {
        match self {
            Self::Blocked(blockers) => blockers
                .iter()
                .any(|blocker| matches!(blocker, AddressBlocker::Kernel(Blocker::NotMigratable { .. }))),
            Self::Kernel(error) => matches!(error, OpenError::NotMigratable { .. }),
            Self::VfioUser(error) => matches!(error, ConnectError::NotMigratable { .. }),
            Self::SimSpec(_) | Self::SimConfig(_) | Self::Sim(_) | Self::Keep { .. } => false,
        }
    }
}

fn list(blockers: &[AddressBlocker]) -> String {
    let told: Vec<String> = blockers.iter().map(ToString::to_string).collect();
    told.join("\n  ")
}

/// Why a kept device could not be taken over.
#[derive(Debug, thiserror::Error)]
#[error("cannot take over {address}")]
pub struct AdoptFailure {
    /// The device.
    pub address: DeviceAddress,
    /// What was given, wherever it can be tried again. `None`: a device process' connection, which is lost
    /// unless the reason says otherwise.
    pub keepsake: Option<Box<Keepsake>>,
    /// Why not.
    #[source]
    pub source: AdoptRefusal,
}

impl AdoptFailure {
    /// Whether it can never be taken over: it is another device, or its connection is over. Anything else may be of this
    /// process or of the moment, and what was kept is as it was.
    pub fn is_for_good(&self) -> bool {
        match &self.source {
            AdoptRefusal::AnotherDevice { .. } => true,
            AdoptRefusal::VfioUser(error) => match &**error {
                ConnectError::NotAConnection { .. } | ConnectError::StateLost { .. } => true,
                ConnectError::Socket { .. }
                | ConnectError::Handshake { .. }
                | ConnectError::Probe { .. }
                | ConnectError::NotMigratable { .. }
                | ConnectError::Flags { .. } => false,
            },
            AdoptRefusal::Keepsake(_) | AdoptRefusal::Kernel(_) | AdoptRefusal::Keep(_) => false,
        }
    }
}

/// Why a kept device was not taken over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdoptRefusal {
    /// It is another device.
    #[error("what was kept is {kept}")]
    AnotherDevice {
        /// The address that was kept.
        kept: DeviceAddress,
    },
    /// What was kept is not what this kind of device consists of.
    #[error(transparent)]
    Keepsake(#[from] KeepsakeError),
    /// The kernel device.
    #[error(transparent)]
    Kernel(Box<OpenError>),
    /// The device process.
    #[error(transparent)]
    VfioUser(Box<ConnectError>),
    /// No new duplicates could be made for the holder. The holder's own are untouched.
    #[error("no fds are left; raise this process' limit of open files")]
    Keep(#[source] io::Error),
}

impl DeviceAddress {
    /// Everything that is known to stand in the way, told at once. Nothing is opened, nobody is connected to.
    pub fn blockers(&self, roots: &SysRoots) -> Vec<AddressBlocker> {
        match self {
            Self::Kernel(name) => match find(roots, &name.to_string()) {
                Ok(found) => found.blockers().into_iter().map(AddressBlocker::Kernel).collect(),
                Err(error) => vec![error.into()],
            },
            Self::Sim(_) => Vec::new(),
            Self::VfioUser(path) => match fs::metadata(path.as_path()) {
                Ok(found) if found.file_type().is_socket() => Vec::new(),
                Ok(_) => vec![AddressBlocker::NotASocket { path: path.as_path().to_owned() }],
                Err(source) => vec![AddressBlocker::NoSocket { path: path.as_path().to_owned(), source }],
            },
        }
    }

    /// Opens the device. **A kernel device is reset by it**; it is refused first where sysfs already shows that it cannot
    /// work. A simulated device is made anew.
    pub fn open(&self, access: Access) -> Result<Opened, OpenFailure> {
        match self {
            Self::Kernel(name) => {
                let blockers = self.blockers(&access.roots);
                if !blockers.is_empty() {
                    return Err(OpenFailure::Blocked(blockers));
                }
                let options = OpenOptions { path: access.path, roots: access.roots };
                let device = KernelDevice::open(&name.to_string(), &options)?;
                let keepsake = access.keep.then(|| Keepsake::of_kernel(self, &device)).transpose();
                Ok(Opened { keepsake: keepsake.map_err(self.unkept())?, device: Box::new(device), sim: None })
            }
            Self::Sim(address) => {
                let mut config = address.config()?;
                if let Some(name) = access.name {
                    config.name = name;
                }
                let slot = SimDevice::new(config, access.clock)?;
                let device = Box::new(slot.open()?);
                Ok(Opened { device, sim: Some(slot), keepsake: None })
            }
            Self::VfioUser(path) => {
                let keep = access.keep;
                let within = access.connect_within;
                let device = VfioUserDevice::connect(path.as_path(), access.connecting(within))?;
                let keepsake = keep.then(|| Keepsake::of_vfio_user(self, &device)).transpose();
                Ok(Opened { keepsake: keepsake.map_err(self.unkept())?, device: Box::new(device), sim: None })
            }
        }
    }

    /// Takes over an open device whose owner is gone. Nothing is reset or detached, and the migration state is left as it
    /// is: read it. With [`Access::keep`] there is a new keepsake: give it to the holder in place of the old one.
    pub fn adopt(&self, keepsake: Keepsake, access: Access) -> Result<Opened, AdoptFailure> {
        if keepsake.address != *self {
            let kept = keepsake.address.clone();
            return Err(self.not_adopted(Some(keepsake), AdoptRefusal::AnotherDevice { kept }));
        }
        let Keepsake { address, identity, kind, fds } = keepsake;
        match kind {
            KeepsakeKind::Kernel { path, ioas_id } => adopt_kernel(path, ioas_id, fds, &identity, |device| {
                access.keep.then(|| Keepsake::of_kernel(self, device)).transpose()
            })
            .map_err(|(fds, refusal)| {
                let kind = KeepsakeKind::Kernel { path, ioas_id };
                self.not_adopted(Some(Keepsake { address, identity, kind, fds }), refusal)
            }),
            KeepsakeKind::VfioUser(facts) => {
                let kept = keepsake::connection(facts, fds).map_err(|(facts, fds, error)| {
                    let kind = KeepsakeKind::VfioUser(facts);
                    self.not_adopted(Some(Keepsake { address, identity, kind, fds }), error.into())
                })?;
                let (keep, within) = (access.keep, access.adopt_within);
                let device = VfioUserDevice::adopt(kept, access.connecting(within))
                    .map_err(|error| self.not_adopted(None, AdoptRefusal::VfioUser(Box::new(error))))?;
                // The holder has its own duplicate still: failing here hangs up on nobody.
                let keepsake = keep
                    .then(|| Keepsake::of_vfio_user(self, &device))
                    .transpose()
                    .map_err(|error| self.not_adopted(None, AdoptRefusal::Keep(error)))?;
                Ok(Opened { device: Box::new(device), sim: None, keepsake })
            }
        }
    }

    fn not_adopted(&self, keepsake: Option<Keepsake>, source: AdoptRefusal) -> AdoptFailure {
        AdoptFailure { address: self.clone(), keepsake: keepsake.map(Box::new), source }
    }

    fn unkept(&self) -> impl FnOnce(io::Error) -> OpenFailure {
        let address = self.clone();
        move |source| OpenFailure::Keep { address, source }
    }
}

impl Access {
    fn connecting(self, connect_within: Duration) -> ConnectOptions {
        ConnectOptions { name: self.name, connect_within, timing: self.timing, ..ConnectOptions::default() }
    }
}

/// Takes over a kernel device. Where that fails its fds come back.
fn adopt_kernel(
    path: KernelPath,
    ioas_id: Option<u32>,
    fds: Vec<OwnedFd>,
    identity: &Identity,
    keep: impl FnOnce(&KernelDevice) -> io::Result<Option<Keepsake>>,
) -> Result<Opened, (Vec<OwnedFd>, AdoptRefusal)> {
    let fds = keepsake::kernel_fds(path, ioas_id, fds).map_err(|(fds, error)| (fds, error.into()))?;
    let device = KernelDevice::from_fds(fds, identity.clone()).map_err(|AdoptError { fds, source }| {
        (keepsake::plain_fds(fds), AdoptRefusal::Kernel(Box::new(source)))
    })?;
    match keep(&device) {
        Ok(keepsake) => Ok(Opened { device: Box::new(device), sim: None, keepsake }),
        Err(error) => Err((keepsake::plain_fds(device.into_fds()), AdoptRefusal::Keep(error))),
    }
}
