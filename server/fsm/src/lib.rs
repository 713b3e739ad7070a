//! The VFIO migration state machine, and the save and restore operations on top of it.
//!
//! Everything here is a pure decision: no I/O, no clock, no allocation on the paths that a device waits for,
//! no dependency. An executor elsewhere asks what to do, does it, and reports what happened.
//!
//! ```text
//!   handover            a save here and a restore there as one move: who may run, and what each side has on record
//!        |
//!   save / restore      one operation over a set of devices: which command is next, what a failure means
//!        |
//!   recovery, outcome   one device after a failed SET: nothing, walk back, reset, or quarantine
//!        |
//!   walk, arc           one device: the hops between two states, what each does to the data stream,
//!        |              and where to go when it fails
//!   state, capabilities the vocabulary of the kernel's <linux/vfio.h>
//! ```
//!
//! # The device machine
//!
//! Eight states; which of them exist depends on the device's [`Capabilities`]. [`path`] tells every hop of a
//! walk before the kernel is asked to take it, so that an impossible request is a value and never an ioctl:
//!
//! ```
//! use vfio_checkpoint_fsm::{Capabilities, State, Walk, path};
//!
//! let capabilities = Capabilities { p2p: true, pre_copy: true };
//! let Walk::Path(walk) = path(capabilities, State::Running, State::StopCopy) else {
//!     panic!("STOP_COPY can be reached from RUNNING");
//! };
//! assert_eq!(walk.to_string(), "RUNNING -> RUNNING_P2P -> STOP -> STOP_COPY");
//! assert!(walk.opens_stream());
//! ```
//!
//! # The operation machines
//!
//! [`SaveState`] and [`RestoreState`] move a whole set of devices. A state is consumed by its event and a
//! [`Step`] comes back: moved (with exactly one command for the executor), a no-op (the event is known and
//! changes nothing), or illegal (the event has no business here; nothing moves). The diagrams of all machines
//! are in `docs/`, generated from this code and kept current by a test.
//!
//! # Invariants
//!
//! - Every walk ends, within [`MAX_HOPS`], on an arc that the device's capabilities allow.
//! - Every arc has a fallback, and a fallback never contradicts [`recover`].
//! - A reset is [`Outcome::StateLost`], always, and automatic for a destination only.
//! - A restored set runs only after its seal was verified and the owner of its interrupts and mappings said
//!   Ready.
//! - Nothing ends in success after a failure, or for a part of the set.
//! - Every operation ends: its moves form no cycle.

#![forbid(unsafe_code)]

mod arc;
mod capabilities;
mod forbidden;
pub mod handover;
mod outcome;
mod plan;
mod recovery;
mod restore;
mod save;
mod state;
mod step;
mod walk;

pub use arc::{Arc, Fallback, StreamEffect};
pub use capabilities::{Capabilities, CapabilitiesError};
pub use forbidden::Forbidden;
pub use outcome::Outcome;
pub use plan::PlanRefusal;
pub use recovery::{Recovery, Role, after_failed_reset, after_failed_walk, recover, recover_entry};
pub use restore::{AfterLoad, RestoreCommand, RestoreEvent, RestorePlan, RestoreState, RestoreStep};
pub use save::{
    AfterSave, Cutover, Fate, SaveCommand, SaveEvent, SavePlan, SaveRequest, SaveState, SaveStep, Validity,
};
pub use state::{State, Stream, UnknownState, UnknownStateName};
pub use step::Step;
pub use walk::{MAX_HOPS, Next, Path, Walk, next_hop, path};
