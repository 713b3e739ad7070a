//! The node agent: owns VFIO devices, saves and restores them over gRPC.
//!
//! ```text
//!   peer --TLS--> security --> rpc --> core { registry, operations, journal } --> device
//!                  who, may      thin    what is whose, what is under way          how
//!                                          \--> transfer <--> stream of state
//! ```
//!
//! Read in this order:
//! 1. [`operation`]: a long job on a set of devices, from its admission to its end, and after a crash;
//! 2. [`registry`]: the devices and who has them;
//! 3. [`journal`] and [`holder`]: what outlives the agent, on disk and as open files;
//! 4. [`transfer`]: state between devices and a stream; [`migration`]: devices between two agents;
//! 5. [`security`] and [`rpc`]: who may call what, and the calls;
//! 6. [`boot`] and [`serve`]: how it all begins and ends;
//! 7. [`config`], [`telemetry`], [`environment`]: what it is told, what it tells, and what is not deterministic.

pub mod boot;
pub mod config;
pub mod core;
mod counted;
pub mod environment;
pub mod failpoint;
pub mod holder;
pub mod journal;
pub mod migration;
pub mod operation;
mod reason;
pub mod registry;
pub mod rpc;
pub mod security;
pub mod serve;
pub mod stores;
pub mod telemetry;
pub mod transfer;
