//! Devices in another process, over a Unix socket: the vfio-user protocol, both ends of it.
//!
//! ```text
//!                      codec: bytes <-> messages, no I/O
//!                     /                                 \
//!   client::VfioUserDevice --connection-- Unix socket --server-- any MigrationDevice
//!   (a MigrationDevice)     one exchange at a time, DMA_READ and DMA_WRITE answered meanwhile
//! ```
//!
//! Bytes are those of libvfio-user's headers; facts about it and about the protocol's text, where they differ from each
//! other, are told where they matter. No more than messages is trusted of a peer, and no length of it at all.
//!
//! # Invariants
//! - Read and written without `unsafe`: file descriptors go beside the bytes through rustix.
//! - A connection that was lost in the middle of anything stays lost, and the state behind it is not guessed at.
//!
//! # Failure paths
//! [`ConnectError`] before there is a device; [`DeviceError`](crate::DeviceError) after. [`PeerError`] names how a
//! device's process broke the protocol.

pub mod client;
pub mod codec;
pub mod connection;
pub mod server;

pub use client::{ConnectError, ConnectOptions, ConnectionFacts, KeptConnection, VfioUserDevice};
pub use connection::{DmaTarget, Generation, NoMemory, PeerError, Timing};
