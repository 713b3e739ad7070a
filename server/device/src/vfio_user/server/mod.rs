//! A vfio-user server around any [`MigrationDevice`]: a device in another process, for a VMM or an agent to attach to.
//!
//! ```text
//!   SocketFile::bind -> listener --> doorman: one connection at a time, the others closed at once
//!                                       | its thread
//!                                       v
//!                                    connection: VERSION, then command by command
//!                                       |   wire: whole messages and descriptors, bounded
//!                                       v
//!                                    session: what one client has  --> pci, irqs, dma, feature
//!                                       |
//!                                       v
//!                                    MigrationDevice: every decision is the device's
//! ```
//!
//! It is synchronous and has one thread a connection. What it answers is what the device answers, errno for errno:
//! every move that the state machine knows, RUNNING_P2P and PRE_COPY_P2P included, where the device has them. Two things
//! the protocol has no words for: how much is left to pre-copy (the server asks the device itself when a round of reads
//! has ended, because many devices make dirty pages readable on being asked), and a data fd (`MIG_DATA_READ` and
//! `MIG_DATA_WRITE` act on the stream that was opened last).
//!
//! # Invariants
//! - One client at a time; a second is closed at once. Whoever comes after a client finds nothing of it: no interrupt,
//!   no mapping, no log, and with [`ServerOptions::reset_on_disconnect`] a device that was reset.
//! - No length from a peer is believed: what a message may hold is agreed on, and checked before it is allocated.
//!
//! # Failure paths
//! - A command that cannot be done is answered with an errno; the connection goes on.
//! - A connection that is lost, or on which messages can no longer be told apart, ends, and the device is reset.
//! - The server itself ends with [`ServeError`] when it can accept nobody any more. The device is dropped then.

mod connection;
mod dma;
mod doorman;
mod errno;
mod feature;
mod irqs;
mod pci;
mod session;
mod socket;
mod wire;

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::Duration;

pub use self::pci::PciFunction;
pub use self::socket::{SocketError, SocketFile};

use self::doorman::Bell;
use super::codec::Limits;
use crate::MigrationDevice;

/// How a device is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerOptions {
    /// The PCI function that clients see, where the device has a configuration space.
    pub function: PciFunction,
    /// The most data in one message; what is agreed on is the smaller of this and what the client says.
    pub limits: Limits,
    /// The most DMA windows that a client may have mapped at one time.
    pub max_dma_windows: usize,
    /// Whether the device is reset when its client is gone, as libvfio-user does. Otherwise it stays in the state in
    /// which it was left, without its data stream, for the next client to find.
    pub reset_on_disconnect: bool,
    /// Within which time a connection must have said what it speaks; later it must make room for others.
    pub handshake_timeout: Duration,
    /// Whether the server ends with its first client.
    pub once: bool,
}

impl Default for ServerOptions {
    /// 1 MiB a message, 65535 windows, reset after every client, 10 seconds to begin, client after client.
    fn default() -> Self {
        Self {
            function: PciFunction::default(),
            limits: Limits::default(),
            max_dma_windows: 65535,
            reset_on_disconnect: true,
            handshake_timeout: Duration::from_secs(10),
            once: false,
        }
    }
}

/// Why a server could not go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// The bell that ends the server could not be made.
    #[error("the server cannot be set up")]
    SetUp(#[source] io::Error),
    /// Nobody can be let in any more.
    #[error("connections cannot be accepted")]
    Accept(#[source] io::Error),
    /// A connection's thread did not start.
    #[error("a connection's thread did not start")]
    Thread(#[source] io::Error),
    /// A connection's thread panicked, with the device.
    #[error("serving a connection panicked; please report this as a defect")]
    Panicked,
}

/// A server that was not started yet.
#[derive(Debug)]
pub struct Server {
    device: Box<dyn MigrationDevice>,
    listener: UnixListener,
    options: ServerOptions,
    bell: Arc<Bell>,
}

impl Server {
    /// A server of `device` for whoever connects to `listener`.
    pub fn new(
        device: Box<dyn MigrationDevice>,
        listener: UnixListener,
        options: ServerOptions,
    ) -> Result<Self, ServeError> {
        let bell = Arc::new(Bell::new().map_err(ServeError::SetUp)?);
        Ok(Self { device, listener, options, bell })
    }

    /// What ends the server, from any thread.
    pub fn handle(&self) -> ServerHandle {
        ServerHandle { bell: Arc::clone(&self.bell) }
    }

    /// Serves until [stopped](ServerHandle::stop), or until its first client is gone with [`ServerOptions::once`].
    /// Returns the device.
    pub fn run(self) -> Result<Box<dyn MigrationDevice>, ServeError> {
        doorman::attend(self.device, &self.listener, &self.options, &self.bell)
    }
}

/// Ends a server.
#[derive(Debug, Clone)]
pub struct ServerHandle {
    bell: Arc<Bell>,
}

impl ServerHandle {
    /// Closes the connection under way, after the device call that it is in, and ends the server. More than once is no
    /// more than once.
    pub fn stop(&self) {
        self.bell.stop();
    }
}

/// Serves `device` to whoever connects to `listener`, one at a time, until the server fails or, with
/// [`ServerOptions::once`], its first client is gone. [`Server`] is the same with a way to end it.
pub fn serve(
    device: Box<dyn MigrationDevice>,
    listener: UnixListener,
    options: ServerOptions,
) -> Result<Box<dyn MigrationDevice>, ServeError> {
    Server::new(device, listener, options)?.run()
}

/// Serves `device` on a connection that is there already, until it ends. Returns the device.
pub fn serve_stream(
    device: Box<dyn MigrationDevice>,
    stream: &UnixStream,
    options: &ServerOptions,
) -> Box<dyn MigrationDevice> {
    connection::talk(device, stream, options).device
}
