//! Long jobs on sets of devices.
//!
//! ```text
//!   rpc --spec--> admission (pure: blockers, plan, prediction)
//!                    | none
//!                 lease, journal Admitted, task
//!                    |                                   Cutover, Resume, Cancel
//!   StreamState --attach--> task: device::operation <----- signals ------ rpc
//!                              |  moved(step) -> journal, view
//!                              v
//!                           end: journal Ended, give the lease back
//! ```
//! The decisions are `fsm`'s and the device layer's; this module admits, records, and tells.
//!
//! # Invariants
//! - Nothing is touched before the stream is open, and nothing is leased before every blocker was looked for.
//! - A step is durable in the journal before its command is executed, where it is one that a restart depends on.
//! - Every operation ends, and its end is durable before its devices are given back.

pub mod admission;
mod caller;
mod end;
mod entry;
mod kept;
mod meter;
pub mod record;
mod run;
mod signals;
mod start;
pub(crate) use kept::{Asked, about};
pub(crate) use run::{Way, Work, device_manifests, manifest, run, span};
pub(crate) use start::{Waits, hex};
mod table;
mod take_up;

pub use entry::{Cancel, Entry, Fixed, Handover, Live, Opener, Phase, Refused, Reserved, View};
pub use signals::Signals;
pub use start::{Started, Starter};
pub use table::Operations;
pub use take_up::Unfinished;
