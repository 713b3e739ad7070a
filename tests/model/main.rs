//! The hand-over of a set of devices between two nodes, checked in every order in which its parts can act.
//!
//! ```text
//!   fsm: SaveState, OfferStep,                 setup.rs        what may go wrong, and the planted bugs
//!        RestoreState, ArrivalStep,  -- used   world.rs        one state of everything
//!        Verdict, resolve               by ->  source.rs       the source's agent
//!                                              destination.rs  the destination's agent
//!                                              arrived.rs      its devices
//!                                              handover.rs     both, the administrator, and the network
//!                                              oracle.rs       what must hold in every state
//!                                              liveness.rs     every run ends
//!                                              checks.rs       the tests
//!                                              page.rs         fsm/docs/handover.md, kept true, from
//!                                                              messages.rs and courses.rs
//! ```
//! Every decision is taken by the types that the agents use; the model has only what is around them: journals whose
//! writes fail, devices whose SETs fail, messages, crashes with and without a holder, time, and an administrator.
//!
//! # Invariants
//! - A sound model holds and ends in every setup. Every plant, which replaces one decision, is found by the property
//!   that is named for it, and is not found without the plant.
//! - Nothing counts as checked that cannot happen: the ends that were reached are compared with a list.
//!
//! # What is not in it
//! More than two attempts and two devices, a hand-over back or onward to a third node, the caller's cutover, and an owner
//! who says Ready late. Reading the state while devices run, and stopping them, moves a whole set in one step. A
//! statement that the destination is fenced is only made where it is.
//!
//! # Failure paths
//! A property that does not hold, and a plant, come with the shortest trace; a run that does not end, with the one that
//! was met first.

#![allow(
    clippy::struct_excessive_bools,
    reason = "each is an independent fact of the world, and a state is all of them"
)]
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a test: the helpers outside #[test] functions assert by panicking, too"
)]

mod arrived;
mod checks;
mod courses;
mod destination;
mod handover;
mod liveness;
mod messages;
mod oracle;
mod page;
mod setup;
mod source;
mod world;
