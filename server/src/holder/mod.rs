//! The holder: a small process that keeps devices open while agents come and go.
//!
//! ```text
//!   agent (replaced, upgraded, killed)            holder (outlives them)
//!     HolderClient -- Put{label, fds} ----------->  Shelf: key -> label + duplicates of the fds
//!                  -- List ---------------------->    labels
//!     (next agent) -- Take{key} ----------------->    label + fds; the holder keeps its own
//!                  -- Drop{key} ----------------->    closes them: the last close resets the device
//! ```
//!
//! Read in this order: `label` (what is kept), `protocol` (messages, no I/O), `shelf` (what is held, and how much), then
//! `process` (the loop) and `client`. `packet` and `socket` are one packet with its fds, and the socket's file.
//!
//! # Why it exists
//! Closing the last fd of a VFIO device resets it, and so do most vfio-user processes when their client hangs up. The
//! kernel closes an agent's fds when it dies, so somebody else must have duplicates.
//!
//! # What an agent does
//! Opens a device with [`Access::keep`](vfio_checkpoint_device::address::Access::keep), puts its keepsake before it does
//! anything else with it, and drops its own copy of the keepsake. Puts again what changes: the operation, the epoch, the
//! address space, and the new keepsake of a device that it took over. After a start it lists, takes and adopts; a device
//! whose adoption fails for good is dropped from the holder, which resets it.
//!
//! # Invariants
//! - What is held is never read from, written to, polled or asked anything: whether a device process hung up is for the
//!   next agent to find out.
//! - Nothing that a peer sends makes the holder let go of a device, but a `Drop` or a `Put` with that device's key.
//! - One agent at a time. It is gone when its connection is, which the kernel sees to however it died.
//! - Only the socket's owner and root are served. The socket lies in a folder of its owner's alone, and a lock beside it
//!   keeps a second holder from taking it over.
//! - Every number is bounded: devices, fds, bytes of a packet, connections, time to say who one is.
//!
//! # Failure paths
//! - A malformed packet ends its connection; what is held stays.
//! - An agent that finds its connection lost connects again and puts what it has once more: `Put` is idempotent. An agent
//!   whose `Put` was not answered in time does the same.
//! - A holder that dies takes its duplicates along and nothing else: a living agent has its own. It must be started again
//!   and filled again before the agent may die.
//! - SIGTERM, SIGINT and SIGHUP end it at once, so that a service manager can stop it. It says first which devices the
//!   last close is about to reset, if no agent has them open.
//!
//! # Limits
//! - A peer in a PID namespace that the holder cannot see into is refused, because the kernel then does not say who it
//!   is: run both in one (`shareProcessNamespace`), or the holder in the outer one.
//! - systemd's fd store is not used: neither are fds taken from it, nor put there. A holder that ends lets go.
//! - Closing may reset a device, which takes as long as it takes; the holder answers nobody meanwhile.

mod client;
mod label;
mod packet;
mod process;
mod protocol;
mod shelf;
mod socket;

pub use client::{ClientError, HolderClient, Taken};
pub use label::{BootId, DeviceKey, Facts, InvalidLabel, Label, LabelError, OperationId};
pub use process::{HolderError, HolderOptions, run};
pub use protocol::{MAX_FDS, MAX_PACKET_BYTES, ProtocolError, Refusal, VERSION};
pub use socket::SocketError;
