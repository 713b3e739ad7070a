//! Kernel VFIO devices: PCI functions and mediated devices, through their group or their own node.
//!
//! ```text
//!   KernelDevice (MigrationDevice) --- OpenDevice --- KernelFds { device, attachment }
//!        device.rs    stream.rs         config_space.rs, dma.rs     fds.rs
//!              \__________|___________________|_______________________/
//!                                        |
//!                            sys.rs: ioctls, the only unsafe code
//!
//!   discovery: what there is, unopened --> open.rs: name --> KernelFds
//!   facts.rs: identity and fingerprint     quirks.rs: what single drivers do differently
//! ```
//!
//! The backend stands on plain owned fds, so that a device can be adopted, lent and handed back. vfio-ioctls opens
//! devices of the group path; everything after that is this module's own ioctls.
//!
//! # Invariants
//! - Opening resets a device and takes it from everybody else; it happens only in `open`, on request.
//! - Dropping any value here closes fds and does nothing more to the device.
//! - The process unwinds on a panic: under `panic = "abort"` vfio-ioctls' drop could end it (see `open.rs`).
//!
//! # Failure paths
//! [`OpenError`] names what stands in the way of opening and what to do; [`NotMigratable`] is a finding about an
//! opened device; [`AdoptError`] gives the fds back; a call on an opened device answers
//! [`DeviceError`](crate::DeviceError) with the kernel's errno.

mod config_space;
mod device;
pub mod discovery;
mod dma;
mod dma_log;
pub mod facts;
mod fds;
mod open;
mod open_error;
pub mod quirks;
mod stream;
mod sys;

pub use device::{CannotMigrate, KernelDevice, OpenDevice};
pub use dma::{DmaMapping, DmaMemory};
pub use fds::{Attachment, KernelFds, KernelPath};
pub use open::OpenOptions;
pub use open_error::{AdoptError, NotMigratable, OpenError};
