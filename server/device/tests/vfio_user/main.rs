//! The vfio-user server, asked by hand, by this project's client, and by peers that mean it no good.
//!
//! ```text
//!   served.rs     a simulated device behind a server: on a thread, or in another process
//!   raw.rs        a client that sends what a test says and nothing else
//!   protocol.rs   what each command answers: the PCI function, interrupts, DMA windows
//!   features.rs   the same for features and the migration stream
//!   matrix.rs     every move: the same answer over the socket as from the device itself
//!   lifecycle.rs  who may connect, and what is left of a client that is gone
//!   hostile.rs    garbage, lengths that lie, messages cut short, floods
//!   process.rs    the binary: its socket, its signals, its exit codes, its descriptors
//!   migrate.rs    whole saves and restores across processes
//! ```

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, its helpers included")]

mod conformance;
mod features;
mod hostile;
mod lifecycle;
mod matrix;
mod migrate;
mod process;
mod protocol;
mod raw;
mod served;
