//! Keeping a connection past the process that made it, and going on with it in another.
//!
//! ```text
//!   VfioUserDevice::keep() -> KeptConnection { facts, socket }    a duplicate: the server is not hung up on
//!                                   |  (another process, after the first died)
//!   VfioUserDevice::adopt() <-------'
//!       fence: GET_INFO under an id of this owner's own; skips what answers the dead one
//!         answered, and the same device  -> in step, everything asked before is done
//!         anything else                  -> StateLost, and the connection is closed
//! ```
//!
//! # Invariants
//! - Taking over asks one question that changes nothing. Nothing is reset, no region is read, no state is set.
//! - The server answers in order, so once the fence is answered nothing that the dead owner asked for is under way.
//! - What the device can do was asked by the first owner and is kept: a device in STOP_COPY must not be probed again.
//!
//! # Failure paths
//! A request that was cut half-way swallows the fence, which ends in [`ConnectError::StateLost`]; those of this client are
//! written whole or not at all, so that no SIGKILL cuts them. The rest of a reply that was read half-way is skipped. What interrupts the dead owner armed is not known: the capture of the
//! configuration space says none.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::SocketType;
use serde::{Deserialize, Serialize};
use vfio_checkpoint_fsm::Capabilities as MigrationFlags;

use crate::vfio_user::codec::{Code, DeviceInfo, Limits, Negotiated};
use crate::vfio_user::connection::{Connection, Generation, Timing};
use crate::{Call, DeviceCapabilities, DeviceError, Fingerprint};

use super::link::{Shared, no_answer};
use super::open::{self, Probed};
use super::{ConnectError, ConnectOptions, MAX_MSG_FDS, VfioUserDevice};

/// What another process must know of a connection to go on with it.
#[allow(clippy::struct_excessive_bools, reason = "independent features, each there or not")]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionFacts {
    name: String,
    generation: Generation,
    minor: u16,
    max_data_xfer_bytes: u32,
    peer_max_msg_fds: u64,
    migration_pgsize: Option<u64>,
    device_flags: u32,
    regions: u32,
    irqs: u32,
    migration_flags: u64,
    reset: bool,
    data_size: bool,
    dma_logging: bool,
    config_space: bool,
    fingerprint: Fingerprint,
}

impl ConnectionFacts {
    /// The owner that these facts tell of.
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// Counts owners that took the connection over with these facts and left none of their own: the next one then keeps
    /// out of their ids.
    #[must_use]
    pub fn after_owners(mut self, owners: u64) -> Self {
        self.generation = self.generation.after(owners);
        self
    }

    fn negotiated(&self) -> Negotiated {
        Negotiated {
            minor: self.minor,
            limits: Limits::new(self.max_data_xfer_bytes),
            peer_max_msg_fds: self.peer_max_msg_fds,
            migration_pgsize: self.migration_pgsize,
        }
    }

    fn info(&self) -> DeviceInfo {
        DeviceInfo { flags: self.device_flags, regions: self.regions, irqs: self.irqs }
    }

    fn probed(&self) -> Result<Probed, ConnectError> {
        let migration = MigrationFlags::from_kernel_flags(self.migration_flags)
            .map_err(|source| ConnectError::Flags { name: self.name.clone(), source })?;
        let capabilities = DeviceCapabilities {
            migration,
            reset: self.reset,
            data_size: self.data_size,
            precopy_reinit: false,
            dma_logging: self.dma_logging,
            config_space: self.config_space,
        };
        Ok(Probed { info: self.info(), capabilities, fingerprint: self.fingerprint.clone() })
    }
}

/// A connection that is kept: while the socket is open, the device process is not hung up on.
#[derive(Debug)]
pub struct KeptConnection {
    /// What was agreed on and found out.
    pub facts: ConnectionFacts,
    /// A duplicate of the connected socket. Nobody but its owner reads from or writes to it.
    pub socket: OwnedFd,
}

impl VfioUserDevice {
    /// What must be kept for another process to go on with this device if this one dies. Fails where the process has no
    /// fd left.
    pub fn keep(&self) -> io::Result<KeptConnection> {
        let mut link = self.shared.lock();
        let connection = link.connection();
        let Negotiated { minor, limits, peer_max_msg_fds, migration_pgsize } = connection.negotiated();
        Ok(KeptConnection {
            socket: connection.duplicate_socket()?,
            facts: ConnectionFacts {
                name: self.identity.name.clone(),
                generation: connection.generation(),
                minor,
                max_data_xfer_bytes: limits.max_data_xfer_bytes(),
                peer_max_msg_fds,
                migration_pgsize,
                device_flags: self.info.flags,
                regions: self.info.regions,
                irqs: self.info.irqs,
                migration_flags: self.capabilities.migration.kernel_flags(),
                reset: self.capabilities.reset,
                data_size: self.capabilities.data_size,
                dma_logging: self.capabilities.dma_logging,
                config_space: self.capabilities.config_space,
                fingerprint: self.fingerprint.clone(),
            },
        })
    }

    /// Goes on with a connection whose owner is gone. The owner must be gone: two that read from one socket take each
    /// other's answers. The device's migration state is left as it is: read it. Of `options`, the name and the size of
    /// transfers are those that were kept.
    pub fn adopt(kept: KeptConnection, options: ConnectOptions) -> Result<Self, ConnectError> {
        let KeptConnection { facts, socket } = kept;
        let name = facts.name.clone();
        let probed = facts.probed()?;
        let is_stream = rustix::net::sockopt::socket_type(&socket)
            .is_ok_and(|kind| kind == SocketType::STREAM)
            && rustix::net::getpeername(&socket).is_ok();
        if !is_stream {
            return Err(ConnectError::NotAConnection { name });
        }
        let careful = Timing {
            answer_within: Some(options.connect_within),
            // A process that stands still may do so in the middle of a message.
            finish_within: options.timing.finish_within.max(options.connect_within),
        };
        let shared = Shared::new(Connection::adopt(
            UnixStream::from(socket),
            facts.negotiated(),
            facts.generation.after(1),
            MAX_MSG_FDS,
            careful,
            options.dma,
        ));
        fence(&shared, facts.info())
            .map_err(|source| ConnectError::StateLost { name: name.clone(), source })?;
        shared.lock().connection().set_timing(options.timing);
        Ok(Self::of(name, probed, shared))
    }
}

/// One exchange, by which both ends are in step, or one never will be again.
fn fence(shared: &Shared, expected: DeviceInfo) -> Result<(), DeviceError> {
    let mut link = shared.lock();
    let checked = open::device_info(&mut link).and_then(|found| {
        if found == expected {
            return Ok(());
        }
        // The id fits by accident, or the socket is another device's.
        Err(no_answer(Call::Open, Code::GetInfo, "it tells of another device than was kept"))
    });
    checked.inspect_err(|_| link.connection().hang_up())
}
