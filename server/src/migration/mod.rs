//! Devices from node to node: what the source and the destination of a migration do beside a save and a restore.
//!
//! ```text
//!   source                                                destination
//!     Migrate: blockers of both sides  --Prepare?-->        blockers
//!     admitted, leased, on record
//!     Prepare                          ------------>        ticket taken; admitted, leased, on record
//!     device::operation::save ==StreamState==>              device::operation::restore
//!                                      <--Ack{complete}--   Held: on record, and loaded
//!     Committing: on record            --CommitHandover-->  Running: on record; RESUMING -> RUNNING
//!     LettingGo: on record             <--COMMITTED-------  Ended: on record
//!     resets its devices
//! ```
//! Who may run when is decided by [`handover`](vfio_checkpoint_fsm::handover) and the operation machines; its page for
//! readers is `server/fsm/docs/handover.md`. Here are the calls, the ticket, and the waiting.
//!
//! # Invariants
//! - A ticket is used once, by the key that it was made for, for the logical devices and devices that it was made for. It is
//!   shown, and what it is for goes, to the key that it came from: see `peer`.
//! - `CommitHandover` is sent only with Committing on record; it is answered only with its end on record.
//! - Who cannot prove that it prepared a hand-over decides nothing about it, and who cannot prove that it was prepared there
//!   is not heard: see [`proof`](vfio_checkpoint_proto::proof).
//!
//! # Failure paths
//! A destination that cannot be reached is a blocker, or ends the migration before anything was touched. Once
//! `CommitHandover` may have been sent, the source asks for as long as it takes and tells its caller that it is in doubt.

mod agreed;
mod arrival;
mod destination;
mod farewell;
mod peer;
mod redial;
mod resolve;
mod sink;
mod source;
mod tickets;

pub use arrival::ArrivalSource;
pub(crate) use destination::ended;
pub use destination::{Admitted, Prepared, Told};
pub(crate) use farewell::say_farewells;
pub(crate) use redial::{RedialDestination, spool};
pub use resolve::{Resolved, SourceCopy, SourceDevice};
pub use sink::{HandoverSink, Offer};
pub(crate) use source::{Departure, NotTaken};
pub use source::{MigrationStarted, Side};
pub use tickets::{TicketError, Tickets};

use std::time::Duration;

/// How long a destination waits for the commit of a source that sends it by itself. It refuses after that, and the source
/// runs on as soon as it hears so: what a lost connection costs at that moment is no more than this.
pub const COMMIT_PATIENCE: Duration = Duration::from_secs(30);
