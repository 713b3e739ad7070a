//! What a holder keeps of an open device: duplicates of its fds, and the facts without which they are of no use.
//!
//! ```text
//!   Kernel:   [device, container]  or  [device, iommufd] + ioas_id
//!   VfioUser: [connected socket] + what was agreed on over it
//!   encode() -> facts as text, beside the fds -> decode()
//! ```
//!
//! # Invariants
//! - The facts are versioned: a holder outlives agents, so one agent's facts are read by the next release's.
//! - Dropping a keepsake closes its duplicates and does nothing else.

use std::io;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use super::DeviceAddress;
use crate::kernel::{Attachment, KernelDevice, KernelFds, KernelPath};
use crate::vfio_user::{ConnectionFacts, KeptConnection, VfioUserDevice};
use crate::{Identity, MigrationDevice};

/// The version of the facts that this code writes, and the only one it reads.
const VERSION: u32 = 1;
/// The longest text of facts.
const MAX_FACTS_BYTES: usize = 16 * 1024;

/// What must be kept for another process to take an open device over.
#[derive(Debug)]
pub struct Keepsake {
    /// Where the device is.
    pub address: DeviceAddress,
    /// Which device it is.
    pub identity: Identity,
    /// What its fds are, and what must be known besides.
    pub kind: KeepsakeKind,
    /// Duplicates, in the order that the kind says.
    pub fds: Vec<OwnedFd>,
}

/// The facts of one kind of device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeepsakeKind {
    /// A kernel device: its own file, then its container's or iommufd's.
    Kernel {
        /// Which of the two the second fd is.
        path: KernelPath,
        /// The address space in the iommufd.
        ioas_id: Option<u32>,
    },
    /// A device process: the connected socket.
    VfioUser(Box<ConnectionFacts>),
}

/// The facts beside the fds.
#[derive(Debug, Serialize, Deserialize)]
struct Facts {
    version: u32,
    address: DeviceAddress,
    identity: Identity,
    kind: KeepsakeKind,
}

/// What was kept cannot be made sense of.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeepsakeError {
    /// The facts are longer than any.
    #[error("the facts of a kept device have {bytes} bytes; at most {MAX_FACTS_BYTES} are read")]
    TooLong {
        /// How many.
        bytes: usize,
    },
    /// The facts are no text of facts.
    #[error("the facts of a kept device cannot be read")]
    Facts(#[source] serde_json::Error),
    /// They are of another release's.
    #[error(
        "the facts of a kept device are of version {version}, this program reads {VERSION}; start the release that kept it"
    )]
    Version {
        /// Which.
        version: u32,
    },
    /// The fds are not as many as the device consists of.
    #[error("{given} fds were kept of a device that consists of {wanted}")]
    Fds {
        /// How many there are.
        given: usize,
        /// How many there should be.
        wanted: usize,
    },
    /// An iommufd without its address space.
    #[error("which address space of its iommufd the device is in was not kept")]
    NoIoas,
}

impl Keepsake {
    pub(super) fn of_kernel(address: &DeviceAddress, device: &KernelDevice) -> io::Result<Self> {
        let fds = device.duplicate_fds()?;
        let path = fds.attachment.path();
        let ioas_id = match &fds.attachment {
            Attachment::Container { .. } => None,
            Attachment::Iommufd { ioas_id, .. } => Some(*ioas_id),
        };
        Ok(Self {
            address: address.clone(),
            identity: device.identity().clone(),
            kind: KeepsakeKind::Kernel { path, ioas_id },
            fds: plain_fds(fds),
        })
    }

    pub(super) fn of_vfio_user(address: &DeviceAddress, device: &VfioUserDevice) -> io::Result<Self> {
        let KeptConnection { facts, socket } = device.keep()?;
        Ok(Self {
            address: address.clone(),
            identity: device.identity().clone(),
            kind: KeepsakeKind::VfioUser(Box::new(facts)),
            fds: vec![socket],
        })
    }

    /// The facts as text, to be kept beside the fds.
    pub fn encode(&self) -> Result<String, KeepsakeError> {
        let facts = Facts {
            version: VERSION,
            address: self.address.clone(),
            identity: self.identity.clone(),
            kind: self.kind.clone(),
        };
        let text = serde_json::to_string(&facts).map_err(KeepsakeError::Facts)?;
        if text.len() > MAX_FACTS_BYTES {
            return Err(KeepsakeError::TooLong { bytes: text.len() });
        }
        Ok(text)
    }

    /// The keepsake again, from its facts and its fds. On an error the fds are closed: give duplicates.
    pub fn decode(facts: &str, fds: Vec<OwnedFd>) -> Result<Self, KeepsakeError> {
        /// Read first, because the rest may look different in another version.
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        if facts.len() > MAX_FACTS_BYTES {
            return Err(KeepsakeError::TooLong { bytes: facts.len() });
        }
        let Versioned { version } = serde_json::from_str(facts).map_err(KeepsakeError::Facts)?;
        if version != VERSION {
            return Err(KeepsakeError::Version { version });
        }
        let Facts { version: _, address, identity, kind } =
            serde_json::from_str(facts).map_err(KeepsakeError::Facts)?;
        Ok(Self { address, identity, kind, fds })
    }

    /// Counts processes that were given this keepsake and may have begun to use it: what answers them, if they died
    /// since, is not taken for an answer to the next one.
    #[must_use]
    pub fn after_owners(mut self, owners: u64) -> Self {
        self.kind = match self.kind {
            kernel @ KeepsakeKind::Kernel { .. } => kernel,
            KeepsakeKind::VfioUser(facts) => KeepsakeKind::VfioUser(Box::new(facts.after_owners(owners))),
        };
        self
    }
}

/// The fds of a kernel device, in the order in which they are kept.
pub(super) fn plain_fds(fds: KernelFds) -> Vec<OwnedFd> {
    let second = match fds.attachment {
        Attachment::Container { container } => container,
        Attachment::Iommufd { iommufd, .. } => iommufd,
    };
    vec![fds.device, second]
}

/// The same the other way. What does not fit comes back.
pub(super) fn kernel_fds(
    path: KernelPath,
    ioas_id: Option<u32>,
    fds: Vec<OwnedFd>,
) -> Result<KernelFds, (Vec<OwnedFd>, KeepsakeError)> {
    if (path, ioas_id) == (KernelPath::Iommufd, None) {
        return Err((fds, KeepsakeError::NoIoas));
    }
    let [device, second] = exactly(fds)?;
    let attachment = match (path, ioas_id) {
        (KernelPath::Iommufd, Some(ioas_id)) => Attachment::Iommufd { iommufd: second, ioas_id },
        (KernelPath::Container, _) | (KernelPath::Iommufd, None) => {
            Attachment::Container { container: second }
        }
    };
    Ok(KernelFds { device, attachment })
}

/// The connection of a device process. What does not fit comes back.
pub(super) fn connection(
    facts: Box<ConnectionFacts>,
    fds: Vec<OwnedFd>,
) -> Result<KeptConnection, (Box<ConnectionFacts>, Vec<OwnedFd>, KeepsakeError)> {
    match exactly(fds) {
        Ok([socket]) => Ok(KeptConnection { facts: *facts, socket }),
        Err((fds, error)) => Err((facts, fds, error)),
    }
}

fn exactly<const N: usize>(fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], (Vec<OwnedFd>, KeepsakeError)> {
    let given = fds.len();
    fds.try_into().map_err(|fds| (fds, KeepsakeError::Fds { given, wanted: N }))
}
