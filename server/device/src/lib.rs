//! What a migratable device is: the interface, the driver that moves it along its states, and its backends.
//!
//! ```text
//!   caller -> operation -> DeviceLane -> Driver -> MigrationDevice <- kernel | vfio_user | sim
//!              (a set)    (its thread)  (FSM plans)  (one call)
//! ```
//!
//! Read in this order:
//! 1. [`device`]: the interface every backend stands behind, and its rules;
//! 2. [`driver`]: the sole executor of the state machine's plans; what happens when a SET fails;
//! 3. [`lane`]: the device's own thread, and what a call that never returns costs;
//! 4. [`sim`], [`kernel`] and [`vfio_user`]: the backends.
//! 5. [`conformance`]: the rules of the kernel's contract, tried out on any of them;
//! 6. [`address`]: from a device's name to an opened device, or to one that another process kept open.
//!
//! Device work is synchronous, on lanes. What waits for lanes ([`operation`]) is a future, for any runtime or none; this
//! crate has no async runtime and no network. The one module with `unsafe` is `kernel::sys`.

pub mod address;
pub mod capabilities;
pub mod config_space;
pub mod conformance;
pub mod device;
pub mod dma_log;
pub mod driver;
pub mod error;
pub mod executor;
pub mod fault;
mod gate;
pub mod identity;
pub mod kernel;
pub mod lane;
pub mod operation;
pub mod pool;
pub mod sim;
pub mod state_file;
pub mod vfio_user;

pub use address::{DeviceAddress, Keepsake};
pub use capabilities::{DataSize, DeviceCapabilities, PrecopyInfo};
pub use config_space::{ConfigCapture, ConfigSpace, InterruptKind, PciCommand, Rearm};
pub use device::{DataStream, MigrationDevice, Read, RestoreStream, SaveStream};
pub use dma_log::{DirtyBitmap, DirtyReport, DmaLog, IovaRange};
pub use driver::{Driver, Failure, Standing};
pub use error::{Call, DeviceError, chain};
pub use executor::{Clock, Executor, Inline, Lane, Threads};
pub use identity::{Backend, Difference, Fingerprint, Identity};
pub use lane::DeviceLane;
pub use pool::ChunkPool;
pub use vfio_checkpoint_seal::{self as seal, Seal, VerifiedChunk, VerifiedSeal, Verifier};
