//! The client library: connect to an agent, call it, give and take device state.
//!
//! ```text
//!   connect (TCP, TLS, HTTP/2) -> call (typed calls, deadlines, retries, errors with their details)
//!                              -> transfer (the two halves of a stream of state) -> folder (a checkpoint on disk)
//! ```
//!
//! The agent uses `network`, `transfer` and `tls` too: a peer agent is just another client.

pub mod call;
pub mod connect;
pub mod document;
pub mod folder;
pub mod network;
pub mod socket;
pub mod tls;
pub mod transfer;
