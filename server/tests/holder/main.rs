//! The holder as a process, with real device processes behind vfio-user sockets, agents that are killed with -9, and peers
//! that mean it no good.
//!
//! ```text
//!   processes.rs   the holder, the device process and the agent, each in a process of its own
//!   survive.rs     a device with the holder, without it, and with a holder that ends
//!   protocol.rs    put, list, take, drop; one agent at a time; limits
//!   hostile.rs     garbage, too many fds, too long labels, silence, floods, another user
//!   lifecycle.rs   the socket, the lock, the signals, the limit of open files
//! ```

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, its helpers included")]

mod hostile;
mod lifecycle;
mod processes;
mod protocol;
mod survive;
